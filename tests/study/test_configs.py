"""Every configuration that comes with the code has a plan, and says what its comments say."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_progressive.config import load
from megatron_progressive.models import active_parameter_count
from megatron_progressive.study.controls import control_words, fixed_size
from megatron_progressive.study.plan import make_plan, render
from megatron_progressive.study.preflight import smallest_world
from megatron_progressive.train.pilot import plan_pilot

ROOT = Path(__file__).parents[2] / "configs"
RUNS = sorted(p for p in ROOT.rglob("*.yaml") if "grids" not in p.relative_to(ROOT).parts)
LADDERS = {"llama3": (50, ("0.25b", "0.5b", "1b", "2b")), "deepseek_v3": (100, ("0.2b", "0.5b"))}
RUNGS = [
    (ROOT / family / f"{size}_progressive.yaml", tokens)
    for family, (tokens, sizes) in LADDERS.items()
    for size in (*sizes, "tiny")
]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_has_a_plan_and_a_pilot(path: Path) -> None:
    config = load(path)
    plan = make_plan(config)
    assert render(plan)
    assert plan.warnings == []
    assert path.parent == ROOT or config.run.name.startswith(f"{config.model.family}_")
    if config.expansion:
        assert plan_pilot(config).fixed.last_step == pytest.approx(config.train.steps / 4, abs=1)


@pytest.mark.parametrize(("path", "tokens"), RUNGS, ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_rungs_of_the_ladders(path: Path, tokens: int) -> None:
    config = load(path)
    tiny = config.model.preset == "tiny"
    plan = make_plan(config, 2 if tiny else 8)  # two cores; a node of 8 GPUs
    assert smallest_world(config) in (1, 2, 4, 8)
    assert plan.phases[0].phase.num_layers == 0
    assert config.model.preset + "_progressive" == path.stem
    trained = config.train.steps * plan.step_tokens
    assert trained / active_parameter_count(plan.shape) == pytest.approx(tokens, rel=2e-3)
    if not tiny:
        make_plan(config, 16)  # two nodes
    # the words that `mprog plan` prints make the fixed-size control
    assert load(path, control_words(config, fixed_size(config))) == fixed_size(config)
