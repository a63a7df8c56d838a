#!/usr/bin/env bash
# One corpus on many nodes: sbatch $MPROG_SBATCH --array=0-63 launch/prepare.sh CONFIG [key=value …]
#
# Each task of the array prepares its share on all CPUs of one node (--cpus-per-task); no GPU is
# needed. The last one to finish puts all shares together. A task that is warned, preempted or killed
# goes on where it was, also when it is submitted again: --array=3,5 with MPROG_SHARDS=64, the number
# of shares of before.
#SBATCH --job-name=mprog-data
#SBATCH --nodes=1
#SBATCH --ntasks=1
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
mprog_shards=${MPROG_SHARDS:-$((${SLURM_ARRAY_TASK_MAX:-0} + 1))}
mprog_cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}  # which srun would not take over
mprog_run "${mprog_srun[@]}" --ntasks=1 "--cpus-per-task=$mprog_cpus" "${mprog[@]}" data prepare \
    "$@" --shard "${SLURM_ARRAY_TASK_ID:-0}/$mprog_shards" --workers "$mprog_cpus"
