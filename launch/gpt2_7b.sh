#!/usr/bin/env bash
# GPT-2 7B from zero to 60 layers, by default configs/gpt2/7b_progressive.yaml, on 32 ranks or a
# multiple:
#
#   sbatch $MPROG_SBATCH --nodes=4 launch/gpt2_7b.sh [CONFIG] [key=value …]
#
# The 0.15B source trains data parallel on all ranks; at τ the same job goes on with TP=8 x PP=4.
#SBATCH --job-name=mprog-gpt2-7b
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail
mprog_home=${MPROG_HOME:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}
if [ ! -f "$mprog_home/launch/common.sh" ]; then
    echo "$mprog_home is not the clone: submit from the clone, or set MPROG_HOME to it" >&2
    exit 2
fi
source "$mprog_home/launch/common.sh"
mprog_defaults configs/gpt2/7b_progressive.yaml "$@"
mprog_rendezvous
mprog_run "${mprog_srun[@]}" "${mprog[@]}" train "${mprog_words[@]}"
