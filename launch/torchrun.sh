#!/usr/bin/env bash
# One run on several nodes without Slurm: the same command on every node, with
#
#   MPROG_NODES=2        nodes of the job                          (default: 1)
#   MPROG_NODE_RANK=0    this node's number, from 0                (needed above one node)
#   MASTER_ADDR=node0    a name or address of node 0, for all      (needed above one node)
#   MASTER_PORT=29500    a port of node 0 that nothing listens on  (default: 29500)
#   MPROG_NPROC=8        ranks of a node                           (default: its GPUs, or 1)
#   MPROG_RESTARTS=3     restarts after a failure                  (default: 3)
#
#   MPROG_NODES=2 MPROG_NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh CONFIG [key=value …]
#
# After a failure all ranks start anew, on all nodes, and go on from the last save. SIGTERM to the
# script saves and stops (within 30 s: torchrun kills what is not done then); the same command goes
# on. Several nodes have to share the run folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
nodes=${MPROG_NODES:-1}
if [ "$nodes" -gt 1 ]; then
    : "${MPROG_NODE_RANK:?the number of this node, from 0}" "${MASTER_ADDR:?a name or address of node 0}"
fi
nproc=${MPROG_NPROC:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
exec "$MPROG_PYTHON" -m torch.distributed.run \
    --nnodes "$nodes" --node-rank "${MPROG_NODE_RANK:-0}" --nproc-per-node "$((nproc > 0 ? nproc : 1))" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    --max-restarts "${MPROG_RESTARTS:-3}" \
    -m megatron_progressive train "$@"
