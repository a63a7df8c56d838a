# Shared by the launch scripts; source it, do not run it.
#
# Settings of the site. Each can be set in the environment of sbatch instead.
: "${MPROG_PYTHON:=python3}"       # interpreter of the environment that has megatron_progressive
: "${MPROG_SRUN:=srun}"            # e.g. "srun --container-image=… --container-mounts=…"
# Partition, account, time and GPUs per node belong to Slurm: SBATCH_PARTITION, SBATCH_ACCOUNT,
# SBATCH_TIMELIMIT and SBATCH_GPUS_PER_NODE, or options of sbatch.

# By default workers that start anew would meet at addresses of before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Where the ranks of this job meet: the first node, at a port that is the job's own.
mprog_rendezvous() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
}

# Run a command and pass on the warning of a coming end (SIGUSR1, SIGTERM). The command saves and
# ends with 75; then the job goes back to the queue, to go on from there.
mprog_run() {
    local code=0 child
    "$@" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null' USR1 TERM
    while true; do  # a trap ends wait
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap - USR1 TERM
    if [ "$code" -eq 75 ]; then
        echo "stopped after saving; back to the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
