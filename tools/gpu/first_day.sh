#!/usr/bin/env bash
# The first day on a GPU, in one command: bash tools/gpu/first_day.sh OUT
#
# Runs the sections of first_day.py one after another, each with a limit of its own and all within
# MPROG_FIRST_DAY_S seconds (480), and leaves OUT/results.json, OUT/page.md and OUT/logs.txt.gz,
# which are whole after every section. One GPU is enough. Exit code: 0 if every section that had
# time ended well.
#
#   PYTHON   the interpreter (python3)
#   WHEELS   a folder of wheels to install first, into a temporary folder and without an index:
#            Transformer Engine, Megatron-core and what else the machine lacks
set -euo pipefail
out=${1:?usage: tools/gpu/first_day.sh OUT}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$out"
started=$SECONDS
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
# Transformer Engine compiles small kernels at run time, with headers that torch's wheels bring.
headers=$("$python" -c 'import importlib.util as u; s = u.find_spec("nvidia")
print(next((f"{p}/cu13/include" for p in s.submodule_search_locations), "") if s else "")')
[ -d "$headers" ] && export NVTE_CUDA_INCLUDE_DIR=${NVTE_CUDA_INCLUDE_DIR:-$headers}
"$python" "$root/tools/gpu/first_day.py" "$out" --spent $((SECONDS - started))
