"""Mixing time on made-up curves whose crossing is known, on noise, and where they never meet."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_progressive.compare.mixing import averaged, mixing_time, propose
from megatron_progressive.compare.pilot import reservation
from megatron_progressive.config import ConfigError, RunConfig, from_dict
from megatron_progressive.plan.controls import fixed_size
from megatron_progressive.runs.reading import Curve, Run

STEPS, TAU, EVERY = 1000, 20, 20
START, SCALE = 25.0, 60.0  # gap right after τ in %, and the steps over which it falls by e
CROSSING = SCALE * math.log(START / 0.5)  # steps after τ at which it is 0.5 %: 234.7


def pair(
    noise: float = 0.0, shared: float = 0.02, floor: float = 0.0, seed: int = 0,
    train_only: float = 0.0, scale: float = SCALE, before: float = 60.0,
) -> tuple[Run, Run]:  # fmt: skip
    """A progressive and a fixed-size run, whose gap falls exponentially to ``floor`` %.

    ``shared`` is the noise of a batch, which both see; ``noise`` that of each run alone;
    ``before`` the gap up to the expansion, in %.
    """
    config = from_dict(
        {
            "model": {"family": "gpt2", "num_layers": 0},
            "train": {"steps": STEPS, "eval_every": EVERY},
            "expansion": [{"at": TAU, "to_layers": 6}],
        }
    )
    random = np.random.default_rng(seed)
    steps = np.arange(1, STEPS + 1, dtype=float)
    base = 2.5 + 6 * (steps + 10) ** -0.4
    gap = np.where(steps > TAU, START * np.exp(-(steps - TAU) / scale), before) + floor
    batches = shared * random.standard_normal(STEPS)
    own = noise * random.standard_normal((4, STEPS))

    def run(name: str, of: RunConfig, factor: np.ndarray, mine: int, bias: float) -> Run:
        at = steps % EVERY == 0
        curves = []
        for loss, chosen in (
            (base * factor * (1 + bias) * np.exp(batches + own[mine]), steps > 0),
            (base * factor * np.exp(own[mine + 1]), at),
        ):
            values = {"step": steps, "tokens": steps, "flops": steps, "lr": steps, "loss": loss}
            curves.append(Curve({key: value[chosen] for key, value in values.items()}))
        return Run(Path(name), of, *curves)

    return (
        run("progressive", config, 1 + gap / 100, 0, train_only / 100),
        run("fixed", fixed_size(config), np.ones(STEPS), 2, 0.0),
    )


def test_without_noise_the_crossing_lies_in_the_interval() -> None:
    found = mixing_time(*pair())
    assert found.mixed
    assert (found.tau, found.steps_after) == (TAU, STEPS - TAU)
    assert found.steps == 240  # the first validation, every 20 steps, after 234.7
    assert (found.low, found.high) == (220, 240)
    assert found.train.steps == pytest.approx(CROSSING, abs=3)
    assert found.train.share_mixed == 1
    assert found.tokens == 240 * 16 * 128
    assert found.gap_left_percent < 0.01


def test_with_noise_the_interval_holds_the_known_crossing() -> None:
    held, widths = 0, []
    for seed in range(20):
        found = mixing_time(*pair(noise=0.002, seed=seed), draws=100)
        assert found.mixed
        if found.low is not None and found.high is not None:
            held += found.low <= CROSSING <= found.high
            widths.append(found.high - found.low)
    assert held >= 16
    assert np.median(widths) < 150  # it says something


def test_noise_that_both_runs_share_does_not_matter() -> None:
    quiet, loud = mixing_time(*pair(shared=0.0)), mixing_time(*pair(shared=0.3))
    assert quiet == loud


def test_curves_that_never_meet_did_not_mix() -> None:
    for noise in (0.0, 0.002):
        found = mixing_time(*pair(noise=noise, floor=2.0))
        assert not found.mixed
        assert found.steps is found.low is found.high is found.tokens is None
        assert found.train.steps is None
        assert found.gap_left_percent == pytest.approx(2.0, abs=0.3)
        assert propose(pair()[0].config, found, 2048) is None


def test_a_source_that_was_not_behind_is_told_apart() -> None:
    behind, ahead = mixing_time(*pair()), mixing_time(*pair(before=-1.6))
    assert behind.gap_before_percent == pytest.approx(60)
    assert (behind.level_before, reservation(behind)) == (False, "")
    assert ahead.gap_before_percent == pytest.approx(-1.6)
    assert ahead.steps == behind.steps  # of the steps after the expansion alone
    assert ahead.train == behind.train
    assert "had not fallen behind fixed-size" in reservation(ahead)
    assert "(-1.60 % at step 20)" in reservation(ahead)
    assert mixing_time(*pair(before=0.6)).level_before is False
    assert mixing_time(*pair(before=0.4)).level_before is True


def test_one_lucky_validation_is_no_mixing() -> None:
    progressive, fixed = pair(floor=2.0)
    progressive.evals["loss"][30] = 0.9 * fixed.evals["loss"][30]
    assert not mixing_time(progressive, fixed).mixed


def test_runs_that_meet_early_and_part_again_did_not_mix() -> None:
    """Where neither has learnt anything yet the losses are alike."""
    progressive, fixed = pair()
    progressive.evals["loss"][:] = fixed.evals["loss"] * np.where(
        progressive.evals["step"] < 200, 1.001, 1.02
    )
    found = mixing_time(progressive, fixed)
    assert not found.mixed
    assert found.gap_left_percent == pytest.approx(2)
    # and if they meet once more, that is when they mixed
    progressive.evals["loss"][:] *= np.where(progressive.evals["step"] < 600, 1, 1 / 1.02)
    assert mixing_time(progressive, fixed).steps == 600 - TAU


def test_an_end_that_noise_could_move_beyond_the_run_is_open() -> None:
    found = mixing_time(*pair(noise=0.003, scale=230.0, seed=1))  # meets 80 steps before the end
    assert found.mixed
    assert found.train.share_mixed < 0.975
    assert found.high is None
    assert found.low is not None


def test_training_that_disagrees_widens_the_interval() -> None:
    found = mixing_time(*pair(train_only=-2.0))  # its training losses meet much earlier
    assert found.low is not None
    assert found.low == found.train.low
    assert found.low < CROSSING - 50
    assert found.high == 240


def test_average() -> None:
    values = np.array([0.0, 3.0, 6.0, 9.0, 0.0])
    assert averaged(values, 3).tolist() == [1.5, 3, 6, 5, 4.5]
    assert averaged(values, 1).tolist() == values.tolist()
    assert len(averaged(np.array([]), 3)) == 0


def test_tau_follows_in_steps_of_the_run_that_is_meant() -> None:
    found = mixing_time(*pair())
    config = from_dict(
        {
            "model": {"family": "gpt2", "num_layers": 0},
            "train": {"steps": 1000},
            "schedule": {"warmup": 0.02, "decay": 0.1},
            "expansion": [{"at": 0.8, "to_layers": 6}],
        }
    )
    same = propose(config, found, 16 * 128)
    assert same is not None
    assert (same.last_stable, same.mixing_steps, same.tau, same.earliest) == (900, 240, 660, 660)
    half = propose(config, found, 2 * 16 * 128)  # twice the tokens a step: half the steps
    assert half is not None
    assert half.tau == 780
    no_room = propose(replace(config, train=replace(config.train, steps=250)), found, 16 * 128)
    assert no_room is not None
    assert no_room.tau is None


def test_bad_input() -> None:
    progressive, fixed = pair()
    with pytest.raises(ConfigError, match=r"^consecutive: got 0; accepted: from 1"):
        mixing_time(progressive, fixed, consecutive=0)
    with pytest.raises(ConfigError, match=r"^expansion: got none in fixed"):
        mixing_time(fixed, fixed)
    with pytest.raises(ConfigError, match=r"^train\.steps: got 49 validations .* at least 60"):
        mixing_time(progressive, fixed, consecutive=60)
    other = replace(fixed.config, train=replace(fixed.config.train, global_batch=8))
    with pytest.raises(ConfigError, match=r"^train\.global_batch: got 2048 tokens a step"):
        mixing_time(progressive, replace(fixed, config=other))
