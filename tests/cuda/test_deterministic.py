"""``kernels.deterministic`` on the CUDA path: torch refuses an operation that has no kernel with
the same bits each time, when it would launch another. Counting launches torch's own CUDA code, so
what would be refused on a GPU is refused here."""

from __future__ import annotations

import json
import os

from tests.cuda.conftest import Run
from tests.engines.on_ranks import SMALL_FAMILIES

STEP = """
import json, os, sys
from megatron_progressive.runtime.numerics import deterministic_kernels
deterministic_kernels()
import torch
from megatron_progressive.engines.megatron.kernels import kernels_here
from megatron_progressive.models import model_shape
from megatron_progressive.runtime.distributed import Place, world_group
from megatron_progressive.runtime.layout import make_layout
from tests.engines import on_ranks

WIDE = ["model.hidden_size=256", "model.num_layers=2", "kernels.deterministic=true",
        "train.precision=bf16", "data.sequence_length=64"]
found = {}

def attempt(call):
    try:
        call()
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]
    return ""

def steps(family, *words):
    config = on_ranks.family_config(family, [*WIDE, *words])
    layout = make_layout(config.parallel, 1)
    assert kernels_here(config, model_shape(config), layout).deterministic
    engine = on_ranks.make_engine(config, model_shape(config), layout)
    batch = on_ranks.GlobalBatch(
        lambda first, count: torch.zeros(count, 65, dtype=torch.int64), 0, 8)
    engine.train_step(batch, 0.01)
    engine.evaluate([batch])
    engine.close()

with world_group(Place(0, 0, 1)):
    for family, optimizer in json.loads(sys.argv[1]):
        found[family] = attempt(lambda: steps(family, f"optim.name={optimizer}"))
    many = torch.zeros(10000, device="cuda")
    found["planted"] = attempt(lambda: torch.bincount(many.long(), weights=many))
names = "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
found["environment"] = [os.environ.get(name) for name in names]
print(json.dumps(found))
"""
OPTIMIZERS = ("muon_nsgd", "adamw")


def test_every_family_has_deterministic_kernels(on_device: Run) -> None:
    cases = [[family, OPTIMIZERS[i % 2]] for i, family in enumerate(SMALL_FAMILIES)]
    done = on_device("counting", "-c", STEP, json.dumps(cases))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "does not have a deterministic implementation" in found.pop("planted")
    workspace, _, transformer_engine = found.pop("environment")
    assert workspace == os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert transformer_engine == "0"
    assert found == dict.fromkeys(SMALL_FAMILIES, "")
