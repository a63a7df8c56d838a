#!/usr/bin/env bash
# The LLaMA 3 ladder on a job's nodes, every cell in turn on all of them:
#
#   sbatch $MPROG_SBATCH --nodes=2 launch/llama3_scaling.sh [GRID] [key=value …]
#
# key=value words change the runs of the grid; study.dir=… says where the study goes. A job that is
# warned, preempted or requeued goes on where it was; finished cells are not run again. To have one
# job a cell instead: mprog grid submit GRID [key=value …].
#SBATCH --job-name=mprog-llama3
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
mprog_home=${MPROG_HOME:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}
if [ ! -f "$mprog_home/launch/common.sh" ]; then
    echo "$mprog_home is not the clone: submit from the clone, or set MPROG_HOME to it" >&2
    exit 2
fi
source "$mprog_home/launch/common.sh"
mprog_study configs/grids/llama3.yaml "$@"
