"""Mixing time: the tokens after an expansion until the run meets the fixed-size run (arXiv
2511.04981).

There are two readings of the same gap, ``L_progressive / L_fixed - 1`` at the same step, in %:

- of the validation losses. Met at the first of :data:`CONSECUTIVE` validations in a row at or below
  the threshold, after which as many in a row are never above it again (two runs that have hardly
  learnt anything are alike, and part later); true mixing lies between the last validation above it
  before those and that one;
- of the training losses, step by step. Both runs see the same batches in the same order, so what a
  batch adds to both losses cancels. The gap is averaged over a centred window and must stay at or
  below the threshold for as many steps as the validations span. How far noise moves that crossing
  comes from a moving-block bootstrap of the gap around its average (Künsch 1989), whose blocks are
  as long as the window, because neighbouring steps err together.

The interval that is reported spans both readings. Noise as large as the threshold delays both: a
gap that keeps crossing it has not stayed below.

A source that was level with the fixed-size run at the expansion had nothing to catch up with: how
long the loss takes to recover from the expansion says little of one that has fallen behind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_progressive.compare.gaps import MIXED_PERCENT, gap_curve
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.optim.schedule import decay_steps, warmup_steps
from megatron_progressive.runs.reading import Run

CONSECUTIVE = 3
"""How many validations in a row at or below the threshold count as having mixed."""

DRAWS = 400
"""The number of bootstrap samples."""

_TAIL = 0.025  # a 95 % interval

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class TrainReading:
    """The crossing of the training losses; steps are counted from the expansion."""

    window_steps: int
    """The number of steps over which the gap is averaged."""
    steps: int | None
    """The step at which the averaged gap crosses the threshold for good; None where it does not."""
    low: int | None
    high: int | None
    """The upper end of the bootstrap interval; None where that lies beyond what was run."""
    share_mixed: float
    """The share of the bootstrap samples that cross at all."""


@dataclass(frozen=True)
class MixingTime:
    """When a progressive run met the fixed-size run; steps are counted from the expansion."""

    mixed: bool
    threshold_percent: float
    consecutive: int
    tau: int
    """The step of the expansion."""
    steps_after: int
    """The number of steps after the expansion that both runs have."""
    tokens_per_step: int
    steps: int | None
    """The mixing time t_mix in steps; None where the run did not mix."""
    low: int | None
    """The lower end of the interval; None where the run did not mix, and 0 where no validation
    before t_mix was above the threshold."""
    high: int | None
    """The upper end of the interval; None where the run did not mix, or where noise could move it
    beyond what was run."""
    train: TrainReading
    gap_left_percent: float
    """The mean gap of the last validations, of which there are ``consecutive``."""
    unit: str = "tokens"
    """What ``tokens_per_step`` counts: ``tokens``, or ``images`` for models of images."""
    gap_before_percent: float | None = None
    """The mean gap of the training losses in the last steps before the expansion (as many as the
    window); None where the runs share none."""

    @property
    def level_before(self) -> bool:
        """Whether the source had not fallen behind the fixed-size run when it was expanded."""
        return self.gap_before_percent is not None and (
            self.gap_before_percent <= self.threshold_percent
        )

    @property
    def tokens(self) -> int | None:
        """The mixing time t_mix in tokens, or in images."""
        return None if self.steps is None else self.steps * self.tokens_per_step


@dataclass(frozen=True)
class Proposal:
    """The expansion step that follows from a mixing time."""

    last_stable: int
    """The last step at the peak learning rate."""
    mixing_steps: int
    """The mixing time of this configuration in steps: t_mix in tokens over its tokens per step,
    rounded up."""
    tau: int | None
    """The proposed step, ``last_stable - mixing_steps``; None where that is not after the
    warmup."""
    earliest: int | None
    """The proposed step for the upper end of t_mix, which is the careful choice; None where there
    is no such end or no such step."""


def mixing_time(
    progressive: Run, fixed: Run, *, threshold_percent: float = MIXED_PERCENT,
    consecutive: int = CONSECUTIVE, window: int | None = None, draws: int = DRAWS, seed: int = 0,
) -> MixingTime:  # fmt: skip
    """The mixing time of ``progressive``, counted from its last expansion.

    Args:
        threshold_percent: the gap in % up to which the losses count as having met.
        consecutive: the number of validations in a row for which they must have met.
        window: the number of steps over which the training gap is averaged (default: those between
            two validations).
        draws: the number of bootstrap samples.
        seed: the seed of the bootstrap.

    Raises:
        ConfigError: there is no expansion, the runs differ in tokens per step, a parameter is out
            of range, or both runs have fewer validations after the expansion than ``consecutive``.
    """
    for name, value, least in (("threshold_percent", threshold_percent, 0.0),
                               ("consecutive", consecutive, 1), ("window", window, 1),
                               ("draws", draws, 1)):  # fmt: skip
        if value is not None and not value >= least:
            raise ConfigError(f"{name}: got {value}; accepted: from {least}")
    if not progressive.config.expansion:
        raise ConfigError(f"expansion: got none in {progressive.folder}; accepted: a run with one")
    if progressive.step_tokens != fixed.step_tokens:
        raise ConfigError(
            f"train.global_batch: got {progressive.step_tokens} {progressive.unit} a step in "
            f"{progressive.folder} and {fixed.step_tokens} in {fixed.folder}; accepted: equal ones"
        )
    tau = progressive.config.expansion_steps()[-1]
    steps, gaps = gap_curve(progressive, fixed)
    after = steps > tau  # the validation at τ itself is of the model that has just been expanded
    steps, gaps = steps[after] - tau, gaps[after]
    if len(steps) < consecutive:
        raise ConfigError(
            f"train.steps: got {len(steps)} validations after the expansion at step {tau} that "
            f"both runs have; accepted: at least {consecutive}"
        )
    apart = float(np.median(np.diff(steps, prepend=0.0)))
    hold = max(1, round((consecutive - 1) * apart))
    window = max(1, round(apart)) if window is None else window
    train_steps, train_gaps = train_gap(progressive, fixed)
    before = train_gaps[(train_steps > -window) & (train_steps <= 0)]
    later = train_steps > 0
    train = _train_reading(
        train_steps[later],
        train_gaps[later],
        threshold_percent,
        window,
        hold,
        draws,
        np.random.default_rng(seed),
    )
    met = _met(gaps <= threshold_percent, consecutive)
    low = high = None
    if met is not None:
        low, high = (0 if met == 0 else int(steps[met - 1])), int(steps[met])
        low = low if train.low is None else min(low, train.low)
        high = None if train.high is None else max(high, train.high)
    return MixingTime(
        mixed=met is not None,
        threshold_percent=threshold_percent,
        consecutive=consecutive,
        tau=tau,
        steps_after=int(steps[-1]),
        tokens_per_step=progressive.step_tokens,
        steps=None if met is None else int(steps[met]),
        low=low,
        high=high,
        train=train,
        gap_left_percent=float(np.mean(gaps[-consecutive:])),
        unit=progressive.unit,
        gap_before_percent=float(before.mean()) if len(before) else None,
    )


def train_gap(progressive: Run, fixed: Run) -> tuple[_Array, _Array]:
    """The steps that both runs have, counted from the last expansion (0 is the last step before
    it), and the gap of the training losses at each, in %. Steps where either loss is not a number
    are left out."""
    tau = progressive.config.expansion_steps()[-1]
    steps, mine, theirs = np.intersect1d(
        progressive.train["step"], fixed.train["step"], assume_unique=True, return_indices=True
    )
    gaps = 100 * (progressive.train["loss"][mine] / fixed.train["loss"][theirs] - 1)
    kept = np.isfinite(gaps)
    return steps[kept] - tau, gaps[kept]


def averaged(values: _Array, window: int) -> _Array:
    """The centred average over ``window`` values, or over fewer at both ends."""
    if not len(values):
        return values
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _met(below: NDArray[np.bool_], length: int) -> int | None:
    """The index of the first of ``length`` consecutive true values after the last ``length``
    consecutive false ones."""
    parted = _runs(~below, length)
    start = int(parted[-1]) + length if len(parted) else 0
    found = _runs(below[start:], length)
    return start + int(found[0]) if len(found) else None


def _runs(values: NDArray[np.bool_], length: int) -> NDArray[np.int64]:
    """The indices at which ``length`` consecutive true values begin."""
    sums = np.concatenate([[0], np.cumsum(values)])
    return np.flatnonzero(sums[length:] - sums[:-length] == length)


def _train_reading(
    steps: _Array, gaps: _Array, threshold: float, window: int, hold: int, draws: int,
    random: np.random.Generator,
) -> TrainReading:  # fmt: skip
    smooth = averaged(gaps, window)
    rest = gaps - smooth

    def crossing(values: _Array) -> float:
        at = _met(values <= threshold, hold)
        return math.inf if at is None else float(steps[at])

    found = crossing(smooth)
    if not len(gaps):
        return TrainReading(window, None, None, None, 0.0)
    block = min(window, len(rest))
    starts = len(rest) - block + 1
    blocks = math.ceil(len(rest) / block)
    sampled = np.empty(draws)
    for draw in range(draws):
        first = random.integers(starts, size=blocks)
        noise = rest[(first[:, None] + np.arange(block)).ravel()[: len(rest)]]
        sampled[draw] = crossing(smooth + averaged(noise, window))
    # no interpolation: between a finite and an infinite crossing there is none
    low, high = np.quantile(sampled, [_TAIL, 1 - _TAIL], method="closest_observation")
    return TrainReading(
        window_steps=window,
        steps=_step(found),
        low=_step(low),
        high=_step(high),
        share_mixed=float(np.isfinite(sampled).mean()),
    )


def _step(value: float) -> int | None:
    return int(value) if math.isfinite(value) else None


def propose(config: RunConfig, mixing: MixingTime, step_tokens: int) -> Proposal | None:
    """The proposal τ = T_stable - t_mix for a run; None where nothing mixed.

    Args:
        config: the configuration of the run that is to be expanded, whose schedule is ``wsd``.
        step_tokens: the number of tokens in one of its steps.
    """
    if mixing.tokens is None:
        return None
    last_stable = config.train.steps - decay_steps(config)
    needed = math.ceil(mixing.tokens / step_tokens)

    def tau(steps: int) -> int | None:
        found = last_stable - steps
        return found if found > warmup_steps(config) else None

    upper = None
    if mixing.high is not None:
        upper = tau(math.ceil(mixing.high * mixing.tokens_per_step / step_tokens))
    return Proposal(last_stable=last_stable, mixing_steps=needed, tau=tau(needed), earliest=upper)
