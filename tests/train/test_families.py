"""Whole runs of every family on real text: expert parallelism, expansion in the job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool
from tests.train.cases import run_config, train_here
from tests.train.test_training import largest_difference, losses

EXPERTS_AT_TAU = ["expansion.0.parallel.expert=2", "expansion.0.parallel.tensor=2"]
LAYOUTS: dict[str, tuple[Any, ...]] = {
    "one": (1,),
    "dp2": (2,),
    "tp2": (2, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "dp2_tp2": (4, "parallel.tensor=2"),
    "dp2_pp2": (4, "parallel.pipeline=2"),
}
EXPERT_LAYOUTS: dict[str, tuple[Any, ...]] = {
    "ep2": (2, "parallel.expert=2"),
    "ep2_tp2": (4, "parallel.expert=2", "parallel.tensor=2"),
    "dp4_to_ep2_tp2": (4, *EXPERTS_AT_TAU),
}


def of_family(family: str) -> dict[str, Any]:
    return {"model": {"family": family, "preset": "tiny", "num_layers": 1}}


@pytest.mark.parametrize(
    ("family", "optimizer"),
    [("llama3", "muon_nsgd"), ("deepseek_v3", "muon_nsgd"), ("deepseek_v3", "adamw")],
)
def test_same_curve_on_every_layout(
    pool: Pool, corpus: Path, tmp_path: Path, family: str, optimizer: str
) -> None:
    layouts = LAYOUTS if family == "llama3" else {**LAYOUTS, **EXPERT_LAYOUTS}
    lr = {"adamw": 0.002, "muon_nsgd": 0.01}[optimizer]
    curves = {}
    for name, (world, *words) in layouts.items():
        config = run_config(
            tmp_path, corpus, name, f"optim.name={optimizer}", f"optim.lr={lr}",
            "train.save_every=0", "train.micro_batch=2", *words, **of_family(family),
        )  # fmt: skip
        assert set(pool.run(world, train_here, config)) == {0}
        curves[name] = losses(config.folder)
    assert len(curves["one"]) == 60
    assert curves["one"][60] < 0.95 * curves["one"][1]
    differences = {name: largest_difference(curves["one"], curve) for name, curve in curves.items()}
    print(family, optimizer, differences)
    assert max(differences.values()) < 2e-4, differences
