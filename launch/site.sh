# shellcheck shell=bash
# Settings of the site: the one file to edit. Jobs read it; for the options of sbatch source it
# before submitting. Each setting can be set in the environment instead.
#
#   source launch/site.sh && sbatch $MPROG_SBATCH --nodes=4 launch/train.sh CONFIG

# Interpreter of the environment that has megatron_progressive. Empty: that of the clone's own .venv,
# which `make demo` and `make install` make, where it is there, else python3.
: "${MPROG_PYTHON:=}"
# How the ranks of a job start. In a container (Pyxis):
#   "srun --container-image=IMAGE --container-mounts=/data,/home"
: "${MPROG_SRUN:=srun}"
# Options of every job; one task a GPU. `mprog grid submit` uses them too. For nodes of 8 GPUs:
#   "--partition=gpu --account=NAME --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=8:00:00"
: "${MPROG_SBATCH:=}"
export MPROG_PYTHON MPROG_SRUN MPROG_SBATCH
