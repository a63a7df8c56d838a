#!/usr/bin/env bash
# A scaling study on a job's nodes: sbatch --nodes=2 launch/llama3_scaling.sh [GRID]
#
# Every cell of the grid in turn, each on all nodes. A job that is warned, preempted or requeued
# goes on where it was; finished cells are not run again.
#SBATCH --job-name=mprog-llama3
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
source "${MPROG_HOME:-$SLURM_SUBMIT_DIR}/launch/common.sh"
mprog_rendezvous
grid=${1:-configs/grids/llama3_tiny.yaml}
mprog_run "$MPROG_PYTHON" -m megatron_progressive grid run "$grid" --srun "$MPROG_SRUN --kill-on-bad-exit=1"
"$MPROG_PYTHON" -m megatron_progressive grid collect "$grid"
