#!/usr/bin/env bash
# One step of a study as a job; `mprog grid submit` submits it:
#
#   grid_job.sh pilot|report GRID [key=value …]
#   grid_job.sh cell CELLS GRID [key=value …]      a task of an array: its line of the file CELLS
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
mprog_rendezvous
case $1 in
    pilot) mprog_grid_pilot "${@:2}" || [ $? -eq 3 ] ;;  # 3: no τ, and others do not need it
    cell)
        mapfile -t cells < "$2"  # as they were when the job was submitted
        if [ -z "${cells[SLURM_ARRAY_TASK_ID]:-}" ]; then
            echo "grid_job.sh: $2 has no line for task $SLURM_ARRAY_TASK_ID" >&2
            exit 2
        fi
        mprog_grid_cell "${cells[SLURM_ARRAY_TASK_ID]}" "${@:3}"
        ;;
    report) mprog_grid_report "${@:2}" ;;
    *) echo "grid_job.sh: got $1; accepted: pilot, cell, report" >&2; exit 2 ;;
esac
