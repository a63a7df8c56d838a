"""The plan: its numbers, its text, and that it allocates and imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive.config import ConfigError, from_dict, load
from megatron_progressive.cost.flops import total_flops
from megatron_progressive.cost.headroom import headroom_percent
from megatron_progressive.models import (
    FAMILIES,
    TRANSFORMERS,
    active_parameter_count,
    model_shape,
    parameter_count,
)
from megatron_progressive.optim.schedule import learning_rate
from megatron_progressive.plan.controls import fixed_size, never_grown, short_control
from megatron_progressive.plan.plan import make_plan
from megatron_progressive.plan.plan_text import render

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "gpt2").glob("*_progressive.yaml"))


def test_7b_plan_says_what_it_saves() -> None:
    plan = make_plan(load(ROOT / "configs/gpt2/7b_progressive.yaml"))
    text = render(plan)
    assert "0.15B → 7.0B" in text
    assert "50,257, padded to 50,304" in text
    assert plan.saving_percent == pytest.approx(80, abs=3)
    assert f"saving          {plan.saving_percent:.1f} %" in text
    assert "NOT counted" in text
    assert "a guide, not a guarantee" in text
    assert plan.warnings == []


def test_planning_7b_is_quick_and_imports_no_framework() -> None:
    code = (
        "import sys\n"
        "from megatron_progressive.config import load\n"
        "from megatron_progressive.plan.plan import make_plan\n"
        "from megatron_progressive.plan.plan_text import render\n"
        "render(make_plan(load('configs/gpt2/7b_progressive.yaml')))\n"
        "print([m for m in ('torch', 'megatron', 'matplotlib') if m in sys.modules])\n"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 10  # 1 s on an idle core; others may use this one


PRESETS = [(family, preset) for family, found in TRANSFORMERS.items() for preset in found.presets]


@pytest.mark.parametrize(("family", "preset"), PRESETS)
def test_every_preset_has_a_plan(family: str, preset: str) -> None:
    shape = model_shape(from_dict({"model": {"family": family, "preset": preset}}))
    growth: dict[str, Any] = {
        "at": 0.8,
        "to_layers": shape.num_layers,
        "parallel": {"tensor": 2, "uneven": True},
    }
    growth["parallel"] |= {"pipeline": 2} | ({"expert": 4} if shape.moe else {})
    plan = make_plan(
        from_dict(
            {
                "model": {"family": family, "preset": preset, "num_layers": 0},
                "train": {"global_batch": 64},
                "expansion": [growth],
            }
        )
    )
    assert plan.world == (16 if shape.moe else 4)
    text = render(plan)
    flat = " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= 100
    assert f"{parameter_count(shape):,}" in text
    assert ("\n  active  " in text) == (shape.moe is not None)
    if shape.moe is not None:
        assert f"{active_parameter_count(shape):,}" in text
        assert f"{shape.moe.num_experts} a layer, {shape.moe.top_k} a token" in flat
        assert "x EP=4" in text
    if shape.mla is not None:
        assert f"keys and values through {shape.mla.kv_lora_rank}" in flat
    elif shape.num_query_groups < shape.num_attention_heads:
        assert f"{shape.num_query_groups} query groups" in flat
    assert ("position embedding apart" in text) == (family == "gpt2")


@pytest.mark.parametrize("preset", FAMILIES["resnet"].presets)
def test_every_residual_network_has_a_plan(preset: str) -> None:
    model = {"family": "resnet", "preset": preset}
    shape = model_shape(from_dict({"model": model}))
    growth = {"at": 0.8, "to_layers": shape.num_layers}
    plan = make_plan(from_dict({"model": {**model, "num_layers": 0}, "expansion": [growth]}), 4)
    text = render(plan)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert f"{parameter_count(shape):,}" in text
    assert "token" not in text


def test_planning_671b_on_512_ranks_is_quick() -> None:
    """One layer to 61, with prediction, to tensor, pipeline and expert parallelism."""
    layout = {"tensor": 4, "pipeline": 8, "expert": 16, "expert_tensor": 1, "uneven": True}
    config = from_dict(
        {
            "model": {"family": "deepseek_v3", "preset": "671b", "num_layers": 1, "mtp_layers": 1},
            "train": {"global_batch": 2048, "micro_batch": 1, "precision": "bf16"},
            "optim": {"name": "adamw"},
            "expansion": [{"at": 0.8, "to_layers": 61, "parallel": layout}],
        }
    )
    started = time.process_time()
    text = render(make_plan(config, 512))
    assert time.process_time() - started < 30  # 3 s on an idle core
    assert "DP=512 → DP=16 x TP=4 x PP=8 x EP=16 x ETP=1" in text
    assert "1 prediction module" in " ".join(text.split())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_numbers_are_those_of_the_parts(path: Path) -> None:
    config = load(path)
    plan = make_plan(config)
    assert plan.total_flops == total_flops(config)
    assert plan.fixed_flops == total_flops(fixed_size(config))
    assert plan.short_steps == short_control(config).train.steps
    assert plan.never_grown == [(0, never_grown(config)[0].train.steps)]
    assert len(plan.controls) == 3
    assert plan.headroom_percent == pytest.approx(
        headroom_percent(
            plan.phases[-1].active_params,
            config.last_step * plan.step_tokens,
            plan.total_flops / total_flops(fixed_size(config)),
        )
    )
    assert f"{plan.headroom_percent:.1f} % above fixed-size" in " ".join(render(plan).split())
    tau = config.expansion_steps()[0]
    rates = [learning_rate(config, step) for step in range(1, config.train.steps + 1)]
    assert plan.expansions[0].lr_share == pytest.approx(sum(rates[:tau]) / sum(rates))
    # stable steps: those after τ whose rate is the peak
    assert plan.expansions[0].stable_steps == rates[tau:].count(max(rates))
    tokens = config.train.steps * config.train.global_batch * 1024
    assert sum(p.tokens for p in plan.phases) == tokens
    assert f"{tokens:,}" in render(plan)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon_nsgd"])
def test_text_fits_100_columns_and_names_every_phase(schedule: str, optimizer: str) -> None:
    config = from_dict(
        {
            "model": {"family": "gpt2", "num_layers": 0},
            "train": {"steps": 200, "precision": "bf16"},
            "optim": {"name": optimizer},
            "schedule": {"name": schedule},
            "expansion": [
                {"at": 0.6, "to_layers": 2, "init": "zero", "parallel": {"tensor": 2}},
                {"at": 0.9, "to_layers": 6, "insert": "top", "parallel": {"zero_stage": 0}},
            ],
        }
    )
    plan = make_plan(config, 2)
    text = render(plan)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert all(line == line.rstrip() for line in text.splitlines())
    for phase in plan.phases:
        assert f"{phase.phase.first_step}-{phase.phase.last_step}" in text
        assert f"{phase.phase.params:,}" in text
    flat = " ".join(text.split())
    for warning in plan.warnings:
        assert " ".join(warning.split()) in flat
    assert plan.warnings


def test_plan_says_what_climbs_again_after_tau() -> None:
    values: dict[str, Any] = {
        "model": {"family": "gpt2", "num_layers": 1},
        "train": {"steps": 1000},
        "schedule": {"rewarm": 0.02, "rewarm_from": 0.1},
        "expansion": [{"at": 0.5, "to_layers": 4}],
    }
    said = "all layers climb from 10 % in the 20 steps after τ"
    assert said in " ".join(render(make_plan(from_dict(values))).split())
    values["schedule"] = {"rewarm": 0.02, "rewarm_layers": "new"}
    said = "new layers climb from 0 % in the 20 steps after τ"
    assert said in " ".join(render(make_plan(from_dict(values))).split())
    alone = render(make_plan(from_dict({**values, "expansion": []})))
    assert "climb" not in alone


def test_plan_without_expansion_has_no_saving() -> None:
    plan = make_plan(from_dict({"model": {"family": "gpt2"}}), 2)
    assert plan.saving_percent is None
    assert model_shape(plan.config).num_layers == 6
    assert "the run has no expansion" in render(plan)


def test_plan_refuses_what_preflight_refuses() -> None:
    config = load(ROOT / "configs/gpt2/7b_progressive.yaml")
    with pytest.raises(ConfigError, match="does not divide the 8 ranks"):
        make_plan(config, 8)
