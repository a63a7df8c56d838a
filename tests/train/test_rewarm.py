"""Runs whose learning rate climbs again after τ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_progressive.checkpoints.checkpoint import checkpoint_path
from megatron_progressive.config import RunConfig
from megatron_progressive.expansion.depth_map import new_tensors
from megatron_progressive.models import model_shape
from megatron_progressive.optim.schedule import learning_rate
from megatron_progressive.runs.folder import read_metrics
from tests.engines.on_ranks import Full
from tests.expansion.offline_on_ranks import loaded
from tests.pool import Pool
from tests.train.small_runs import run_config, train_here

TAU, CLIMB = 12, 6


def rates_and_losses(config: RunConfig) -> list[tuple[float, float]]:
    found = read_metrics(config.folder)
    return [(event["lr"], event["loss"]) for event in found if event["event"] == "train"]


def state_after(pool: Pool, config: RunConfig) -> Full:
    path = checkpoint_path(config.folder, config.last_step)
    found: Full = pool.run(1, loaded, config, config.expansion[0].to_layers, path)[0]
    return found


def test_all_layers_climb_or_the_new_ones_alone(
    pool: Pool, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    climbs = {"plain": [], "all": [f"schedule.rewarm={CLIMB / 30}"],
              "new": [f"schedule.rewarm={CLIMB / 30}", "schedule.rewarm_layers=new"]}  # fmt: skip
    runs = {
        name: run_config(
            tmp_path, corpus, name, "train.steps=30", f"train.stop_after={TAU + 1}",
            f"expansion.0.at={TAU}", "train.save_every=0", *words,
        )
        for name, words in climbs.items()
    }  # fmt: skip
    for run in runs.values():
        assert pool.run(1, train_here, run) == [0]
    rates = {name: [lr for lr, _ in rates_and_losses(run)] for name, run in runs.items()}
    peak = runs["plain"].optim.lr
    assert rates["plain"] == rates["new"]
    assert rates["all"] == pytest.approx([*rates["plain"][:TAU], peak / CLIMB])
    after = {name: state_after(pool, run) for name, run in runs.items()}
    shapes = model_shape(runs["new"]), model_shape(runs["new"], 4)
    fresh = set(new_tensors(runs["new"].expansion[0], *shapes))
    for (name, slot), value in after["plain"].items():
        same = torch.equal(value, after["new"][name, slot])
        assert same is (name not in fresh or slot != "param"), (name, slot)
        # a sixth of the learning rate for new layers in both
        if name in fresh:
            assert torch.equal(after["new"][name, slot], after["all"][name, slot]), (name, slot)


def test_a_run_that_is_interrupted_in_the_climb_goes_on_with_it(
    pool: Pool, corpus: Path, tmp_path: Path
) -> None:
    words = ["train.steps=24", f"expansion.0.at={TAU}", "schedule.rewarm=0.25",
             "schedule.rewarm_from=0.2", "schedule.rewarm_layers=new",
             "train.save_every=0"]  # fmt: skip
    whole = run_config(tmp_path, corpus, "whole", *words)
    assert pool.run(1, train_here, whole) == [0]
    for stop in (TAU + 2, 24):
        parts = run_config(tmp_path, corpus, "parts", *words, f"train.stop_after={stop}")
        assert pool.run(1, train_here, parts) == [0]
    assert rates_and_losses(parts) == rates_and_losses(whole)
    assert rates_and_losses(whole)[TAU][0] == learning_rate(whole, TAU + 1)
