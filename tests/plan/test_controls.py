"""Controls: equal compute, equal everything else, and commands that make them."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive.config import ConfigError, RunConfig, from_dict, load, to_yaml
from megatron_progressive.cost.flops import step_flops, total_flops
from megatron_progressive.models import model_shape
from megatron_progressive.plan import controls

CONFIGS = Path(__file__).parents[2] / "configs" / "gpt2"


def progressive(
    layers: int, expansion: list[dict[str, Any]], steps: int = 1500, optimizer: str = "muon_nsgd"
) -> RunConfig:
    return from_dict(
        {
            "run": {"name": "run"},
            "model": {"family": "gpt2", "num_layers": layers},
            "train": {"steps": steps, "eval_every": 37},
            "optim": {"name": optimizer},
            "expansion": expansion,
        }
    )


WHOLE = progressive(0, [{"at": 0.5, "to_layers": 6}])
CASES = [
    progressive(0, [{"at": 0.8, "to_layers": 6}]),
    progressive(1, [{"at": 0.5, "to_layers": 4, "parallel": {"tensor": 2}}], 77, "adamw"),
    progressive(
        0,
        [
            {"at": 0.3, "to_layers": 2, "parallel": {"pipeline": 2}},
            {"at": 600, "to_layers": 8, "parallel": {"tensor": 4, "pipeline": 1}},
        ],
    ),
    replace(WHOLE, train=replace(WHOLE.train, stop_after=1000)),
    replace(
        WHOLE,
        schedule=replace(WHOLE.schedule, rewarm=0.1, rewarm_from=0.2, rewarm_layers="new"),
    ),
]


@pytest.mark.parametrize("config", CASES)
def test_short_control_costs_as_much_within_one_step(config: RunConfig) -> None:
    short = controls.short_control(config)
    one_step = step_flops(model_shape(short), short)
    assert 0 <= total_flops(config) - total_flops(short) < one_step
    assert short.train.eval_every == config.train.eval_every
    assert short.run.name == "run_short"


@pytest.mark.parametrize("config", CASES)
def test_each_depth_before_the_full_one_never_grows_for_as_much(config: RunConfig) -> None:
    depths = [config.model.num_layers, *(one.to_layers for one in config.expansion)]
    found = controls.never_grown(config)
    assert [control.model.num_layers for control in found] == depths[:-1]
    for phase, control in enumerate(found):
        one_step = step_flops(model_shape(control), control)
        assert 0 <= total_flops(config) - total_flops(control) < one_step
        assert control.train.steps > config.last_step
        assert (control.expansion, control.train.stop_after) == ([], None)
        assert control.parallel == config.parallel_after(phase)
        assert control.run.name == f"run_never_grown_{depths[phase]}"


def test_a_depth_counts_once_and_the_full_one_is_no_source() -> None:
    moves = [(100, 2), (200, 2), (300, 6), (400, 6)]  # layouts may change without layers
    config = progressive(2, [{"at": at, "to_layers": depth} for at, depth in moves])
    assert controls.depths_before(config) == [2]
    assert [c.model.num_layers for c in controls.never_grown(config)] == [2]


@pytest.mark.parametrize("config", CASES)
def test_fixed_size_is_the_target_on_the_last_layout(config: RunConfig) -> None:
    fixed = controls.fixed_size(config)
    last = config.expansion[-1]
    assert fixed.model.num_layers == last.to_layers
    assert fixed.expansion == []
    assert fixed.parallel == config.parallel_after(len(config.expansion))
    assert fixed.run.name == "run_fixed"
    unchanged = replace(
        fixed, run=config.run, model=config.model, parallel=config.parallel,
        schedule=config.schedule, expansion=config.expansion,
    )  # fmt: skip
    assert {getattr(fixed.schedule, key) for key in controls.AFTER_EXPANSIONS} == {None}
    assert unchanged == config


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("number", [0, 1, 2, -1])
def test_the_command_makes_the_control(config: RunConfig, number: int, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    control = controls.all_controls(config)[number]
    program, verb, read, *words = shlex.split(controls.control_command(str(path), config, control))
    assert (program, verb) == ("mprog", "train")
    assert load(read, words) == control


def test_no_control_without_expansion_or_budget() -> None:
    with pytest.raises(ConfigError, match=r"^expansion: got none"):
        controls.fixed_size(from_dict({"model": {"family": "gpt2"}}))
    with pytest.raises(ConfigError, match=r"^train\.steps: got 2"):
        controls.short_control(progressive(0, [{"at": 2, "to_layers": 6}], steps=2))


@pytest.mark.parametrize("size", ["124m", "7b"])
def test_shipped_fixed_configs_are_the_controls_of_the_progressive_ones(size: str) -> None:
    wanted = controls.fixed_size(load(CONFIGS / f"{size}_progressive.yaml"))
    assert load(CONFIGS / f"{size}_fixed.yaml") == wanted
