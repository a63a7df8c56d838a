# shellcheck shell=bash
# Shared by the launch scripts; source it, do not run it. Settings of the site are in site.sh.
mprog_clone=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$mprog_clone/launch/site.sh"

# A container has an interpreter of its own, which is not looked for from here.
case $MPROG_SRUN in
    *container* | *singularity* | *apptainer* | *docker* | *podman* | *enroot* | *shifter* | *sarus*)
        : "${MPROG_PYTHON:=python3}"
        ;;
    *)
        if [ -z "$MPROG_PYTHON" ] && [ -x "$mprog_clone/.venv/bin/python" ]; then
            MPROG_PYTHON=$mprog_clone/.venv/bin/python
        fi
        : "${MPROG_PYTHON:=python3}"
        # Also what it needs: started in the clone, any interpreter finds the package itself.
        if ! mprog_why=$("$MPROG_PYTHON" -c '
from importlib.util import find_spec
import megatron_progressive.cli
for name in "torch", "megatron":
    if find_spec(name) is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
' 2>&1); then
            echo "MPROG_PYTHON: got $MPROG_PYTHON, which cannot run megatron_progressive" \
                "(${mprog_why##*$'\n'}); accepted: the interpreter of the environment that has it," \
                "in launch/site.sh or the environment (\`make install\` makes .venv, which is found" \
                "by itself)" >&2
            exit 2
        fi
        ;;
esac
export MPROG_PYTHON

# By default workers that start anew would meet at addresses of before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

mprog=("$MPROG_PYTHON" -m megatron_progressive)

# srun for the ranks of a run. Not --kill-on-bad-exit: a rank that stops after saving (75) would
# have the others killed while they leave. A rank that is gone ends the others within --wait.
# shellcheck disable=SC2206  # its options are words
mprog_srun=($MPROG_SRUN --kill-on-bad-exit=0 --wait=60)

# Where the ranks of this job meet: the first node, where this script runs, at a port that nothing
# listens on, below those that the kernel gives out by itself.
# No $(…) from the trap below on: bash 5.2 loses a signal that comes while it parses one.
mprog_rendezvous() {
    shopt -s lastpipe  # read in this shell
    scontrol show hostnames "$SLURM_JOB_NODELIST" | { read -r MASTER_ADDR; cat > /dev/null; }
    MASTER_PORT=$((20000 + RANDOM % 12000))
    while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do
        MASTER_PORT=$((20000 + RANDOM % 12000))
    done
    export MASTER_ADDR MASTER_PORT
}

# A job is warned of its end: SIGUSR1 by --signal, SIGTERM of preemption. Taken from here on, so
# that a warning never ends this script; mprog_run passes it on.
mprog_warnings=0
mprog_child=
mprog_warned() {
    mprog_warnings=$((mprog_warnings + 1))
    # srun passes on USR1. After TERM it would kill the ranks before they have saved.
    [ -z "$mprog_child" ] || kill -USR1 "$mprog_child" 2>/dev/null || true
}
trap mprog_warned USR1 TERM

# This job, or this task of an array, back to the queue. Ends the script. A controller under load
# may take longer to answer than scontrol waits.
mprog_requeue() {
    local job=$SLURM_JOB_ID pause
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    echo "stopped after saving; back to the queue"
    for pause in 1 2 4 8 16 30; do
        scontrol requeue "$job" && exit 75
        sleep "$pause"
    done
    echo "could not go back to the queue: submit again to go on" >&2
    exit 75
}

# Run a command that stops with 75 after saving when it is warned; then the job goes back to the
# queue, to go on from there. A warning that comes before the command can take it ends it, with
# nothing to save: that goes back to the queue too.
mprog_run() {
    local code warnings
    if [ "$mprog_warnings" -gt 0 ]; then
        mprog_requeue
    fi
    "$@" &
    mprog_child=$!
    [ "$mprog_warnings" -eq 0 ] || kill -USR1 "$mprog_child" 2>/dev/null || true
    while true; do
        code=0 warnings=$mprog_warnings
        wait "$mprog_child" || code=$?
        [ "$mprog_warnings" -ne "$warnings" ] || break  # a warning ends wait, too
    done
    mprog_child=
    if [ "$code" -eq 75 ] || { [ "$mprog_warnings" -gt 0 ] && [ "$code" -gt 128 ]; }; then
        mprog_requeue
    fi
    return "$code"
}

# The steps of a study. Words after the grid are key=value changes of its runs.
mprog_grid_pilot() {  # GRID [key=value …]
    mprog_run "${mprog[@]}" grid pilot --srun "${mprog_srun[*]}" "$@"
}
mprog_grid_cell() {  # CELL GRID [key=value …]
    mprog_run "${mprog[@]}" grid run --cell "$1" --srun "${mprog_srun[*]}" "${@:2}"
}
mprog_grid_all() {  # GRID [key=value …]
    mprog_run "${mprog[@]}" grid run --srun "${mprog_srun[*]}" "$@"
}
mprog_grid_report() {  # GRID [key=value …]
    "${mprog[@]}" grid report "$@"
}

# The words of a script: DEFAULT [FILE] [key=value …] as mprog_words, the file first.
mprog_defaults() {
    local default=${MPROG_HOME:-${SLURM_SUBMIT_DIR:-.}}/$1
    shift
    if [ $# -eq 0 ] || [[ "$1" == *=* ]]; then
        set -- "$default" "$@"
    fi
    mprog_words=("$@")
}

# A whole study in this job: every cell in turn on all of its ranks, then the report.
mprog_study() {  # DEFAULT [GRID] [key=value …]
    local code=0
    mprog_defaults "$@"
    mprog_rendezvous
    mprog_grid_all "${mprog_words[@]}" || code=$?
    if [ "$code" -ne 2 ]; then  # 2: what is wrong with the grid has been said
        mprog_grid_report "${mprog_words[@]}"
    fi
    return "$code"
}
