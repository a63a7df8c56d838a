#!/usr/bin/env bash
# One run on a job's nodes: sbatch --nodes=4 launch/train.sh CONFIG [key=value …]
#
# One task a GPU (--ntasks-per-node); a job that is warned, preempted or requeued goes on from its
# last save.
#SBATCH --job-name=mprog
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
# sbatch runs a copy of this file: its own folder is where it was submitted from
source "${MPROG_HOME:-$SLURM_SUBMIT_DIR}/launch/common.sh"
mprog_rendezvous
mprog_run $MPROG_SRUN --kill-on-bad-exit=1 "$MPROG_PYTHON" -m megatron_progressive train "$@"
