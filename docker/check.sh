#!/usr/bin/env bash
# The last check of a build: six steps of the demo, cut small, in bf16, with an expansion. On a GPU where the build has one
# (one rank); else on the stand-in device, where the host computes (two ranks, and another layout after the expansion).
# Where that cannot be had either it says why, and the build goes on: nothing was checked then.
#
#   docker/check.sh [PYTHON]
set -euo pipefail
python=${1:-python}
config=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/configs/demo.yaml
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export MPROG_STANDIN_CACHE=$work/standin OMP_NUM_THREADS=1
words=(run.dir="$work/runs" train.precision=bf16 train.steps=6 train.global_batch=8 train.micro_batch=4
       train.eval_every=6 train.eval_samples=8 train.save_every=3 data.sequence_length=32 data.vocab_size=512
       data.max_bytes=400000 data.validation_fraction=0.1)
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=() ranks=1 where=CUDA
elif "$python" -c 'import sys; from megatron_progressive.standin import available; sys.exit(available())'; then
    device=("$python" -m megatron_progressive.standin --mode computing --) ranks=2 where="the stand-in device"
    words+=(expansion.0.parallel.tensor=2)
else
    echo "not checked: there is no GPU, and no stand-in for one (see the line above)"
    exit 0
fi
"${device[@]}" "$python" -m megatron_progressive train "$config" "${words[@]}" --nproc "$ranks"
"$python" - "$work/runs/demo/metrics.jsonl" <<'EOF'
import json
import sys

events = [json.loads(line) for line in open(sys.argv[1])]
losses = [event["loss"] for event in events if event["event"] == "train"]
assert len(losses) == 6 and all(0 < loss < 20 for loss in losses), losses
assert any(event["event"] == "expansion" for event in events), events
EOF
echo "checked: six steps and an expansion, ranks: $ranks, on $where"
