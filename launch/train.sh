#!/usr/bin/env bash
# One run on a job's nodes: sbatch $MPROG_SBATCH --nodes=4 launch/train.sh CONFIG [key=value …]
#
# One task a GPU (--ntasks-per-node). A job that is warned, preempted or requeued saves and goes on
# from there; after the failure of a node it goes on from the last save.
#SBATCH --job-name=mprog
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
# sbatch runs a copy of this file: its own folder is where it was submitted from
mprog_home=${MPROG_HOME:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}
if [ ! -f "$mprog_home/launch/common.sh" ]; then
    echo "$mprog_home is not the clone: submit from the clone, or set MPROG_HOME to it" >&2
    exit 2
fi
source "$mprog_home/launch/common.sh"
mprog_rendezvous
mprog_run "${mprog_srun[@]}" "${mprog[@]}" train "$@"
