"""Scaling-law fits of an arm's finished runs.

There are two forms, with natural logarithms throughout:

- ``L = E + A / C^alpha`` over training FLOPs C (:func:`fit_compute`);
- ``L = E + A / N^alpha + B / D^beta`` over parameters N and tokens D (:func:`fit_size_tokens`).

The procedure is that of Hoffmann et al. 2022 (arXiv 2203.15556), appendix D.2: a Huber loss with
delta = 1e-3 of the difference in *log* loss, the log of the sum taken as a log-sum-exp of its
terms, minimised from a grid of starts of which the best is kept. The minimiser is that of
:mod:`.solver`, which takes all samples of a bootstrap at once. Logarithms of C, N and D are centred
first, which changes the conditioning and not the optimum.

Intervals are percentiles of a bootstrap that draws every cell's log loss anew around the fit, with
normal noise of the cells' own spread, itself drawn from its chi-squared distribution with as many
degrees of freedom as there are cells beyond parameters. Drawing cells with replacement instead
would say too much of the few cells that studies have: with four, intervals of 95 % held the known
efficiency in 68 % of 25 pairs of synthetic arms, against 96 % this way. An outlier, which hardly
moves the fit, widens them.

A second solver that shares nothing with the first (:mod:`.projection`) fits the same cells; where
it finds a parameter outside of its interval, a note says so.

Where an interval is hardly narrower than what is allowed anyway, the cells do not determine that
parameter: a note says so, and its coefficient, which could be any power of ten, has no value.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from megatron_progressive.config import ConfigError
from megatron_progressive.laws.projection import project
from megatron_progressive.laws.solver import (
    LARGEST_EXPONENT,
    Array,
    best_of,
    grid_starts,
    projected_starts,
    residuals,
)

LEVEL = 0.95
"""The nominal coverage of every interval."""

DRAWS = 400
"""The number of bootstrap samples."""

_NAMES = {1: ("A", "alpha", "E"), 2: ("A", "B", "alpha", "beta", "E")}
_LARGEST = 20.0  # noise of a bootstrap's log loss: one degree of freedom knows no bound
_DRAW_TOLERANCE = 1e-6  # of a draw's optimum: far below the spread between draws
_EDGE = 1e-6  # of an allowed range: so near to a bound is at it
_NONE = 1e-4  # of the lowest loss: an E so small is none
_SAME = (
    0.01  # relative difference of two solvers that is none: cells without noise have no interval
)
_EXACT = 1e-6  # residual of log loss, of cells that lie on their law


@dataclass(frozen=True)
class Interval:
    """A number and its bootstrap interval. None stands for a number that is not finite, or that the
    cells do not determine."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Fit:
    """One fitted law; :func:`dataclasses.asdict` turns it into JSON."""

    form: str
    """Which form it has: ``compute`` or ``size_tokens``."""
    parameters: dict[str, Interval]
    """The values of ``E``, ``A`` and ``alpha`` (and ``B`` and ``beta``), for losses in nats per
    token."""
    cells: int
    inputs: list[list[float]]
    """The least and the greatest value of each input among the cells; beyond them the law
    extrapolates."""
    rms_log_residual: float
    """The root mean square of log predicted loss minus log loss."""
    seed: int
    """The seed of the bootstrap."""
    names: list[str]
    """The names of the numbers in a row of ``draws``."""
    best: list[float]
    """The fit itself, in the order of ``names``."""
    draws: list[list[float]]
    """The fit of each bootstrap sample, in the same order."""
    notes: list[str] = field(default_factory=list)
    """What the cells cannot tell."""
    undetermined: list[str] = field(default_factory=list)
    """The parameters that the cells do not determine, which are no finding: exponents and E, with a
    note that says why, and the coefficients of these exponents."""


def fit_compute(compute: ArrayLike, loss: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Fit:
    """Fit ``L = E + A / C^alpha``.

    Args:
        compute: the training FLOPs of each cell.
        loss: the final validation loss of each cell, in nats per token.
        draws: the number of bootstrap samples.
        seed: the seed of the bootstrap.

    Raises:
        ConfigError: lengths differ, a value is not above 0, or there are fewer than 4 distinct
            computes (one more than there are parameters).
    """
    inputs, losses = _checked({"compute": compute}, loss)
    distinct, needed = len(np.unique(inputs)), len(_NAMES[1]) + 1
    if distinct < needed:
        raise ConfigError(
            f"cells: got {distinct} distinct computes; accepted: at least {needed} for "
            f"E + A / C^alpha"
        )
    return _fit("compute", inputs, losses, draws, seed)


def fit_size_tokens(
    size: ArrayLike, tokens: ArrayLike, loss: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> Fit:
    """Fit ``L = E + A / N^alpha + B / D^beta`` (arXiv 2203.15556, equation 2).

    Args:
        size: the number N of parameters of each cell.
        tokens: the number D of training tokens of each cell.
        loss: the final validation loss of each cell, in nats per token.

    Raises:
        ConfigError: lengths differ, a value is not above 0, there are fewer than 6 distinct (N, D)
            or fewer than 3 distinct N or D, or the tokens follow from the size in every cell, so
            that the two terms cannot be told apart.
    """
    inputs, losses = _checked({"size": size, "tokens": tokens}, loss)
    pairs, needed = len(np.unique(inputs, axis=0)), len(_NAMES[2]) + 1
    sizes, lengths = (len(np.unique(column)) for column in inputs.T)
    form = "E + A / N^alpha + B / D^beta"
    if pairs < needed:
        raise ConfigError(
            f"cells: got {pairs} distinct sizes and tokens; accepted: at least {needed} for {form}"
        )
    if min(sizes, lengths) < 3:
        raise ConfigError(
            f"cells: got {sizes} distinct sizes and {lengths} distinct tokens; accepted: at least "
            f"3 of each for {form}"
        )
    if pairs == sizes == lengths:
        raise ConfigError(
            f"cells: got one number of tokens for each of {sizes} sizes; accepted: several for "
            f"some size, for {form}"
        )
    return _fit("size_tokens", inputs, losses, draws, seed)


def _checked(inputs: dict[str, ArrayLike], loss: ArrayLike) -> tuple[Array, Array]:
    """The inputs as (cells, inputs) and the losses as (cells,)."""
    values = {name: np.asarray(v, dtype=np.float64) for name, v in {**inputs, "loss": loss}.items()}
    cells = values["loss"].shape
    for name, array in values.items():
        if array.ndim != 1 or array.shape != cells:
            raise ConfigError(
                f"cells: got {name} of shape {array.shape} with losses of {cells}; accepted: one "
                f"of each a cell"
            )
        if not (np.isfinite(array) & (array > 0)).all():
            bad = array[~(np.isfinite(array) & (array > 0))][0]
            raise ConfigError(f"cells: got {name} {bad:g}; accepted: finite numbers above 0")
    return np.stack([values[name] for name in inputs], axis=1), values["loss"]


def _fit(form: str, inputs: Array, losses: Array, draws: int, seed: int) -> Fit:
    cells, count = inputs.shape
    centre = np.log(inputs).mean(axis=0)
    logs, log_loss = np.log(inputs) - centre, np.log(losses)[None]
    starts = np.concatenate([grid_starts(logs, log_loss[0]), projected_starts(logs, log_loss)])
    best = best_of(starts[None], logs, log_loss)
    residual = residuals(best, logs, log_loss)[0][0]
    random = np.random.default_rng(seed)
    spare = cells - best.shape[1]
    spread = np.sqrt(residual @ residual / random.chisquare(spare, (draws, 1)))
    noise = np.clip(spread * random.standard_normal((draws, cells)), -_LARGEST, _LARGEST)
    drawn = log_loss + residual + noise
    # the optimum of the cells is near most draws' own; where the valley is long, not near all
    both = np.stack([np.repeat(best, draws, axis=0), projected_starts(logs, drawn)], axis=1)
    names, law = list(_NAMES[count]), _natural(best[0], centre)
    rows = [_natural(theta, centre) for theta in best_of(both, logs, drawn, _DRAW_TOLERANCE)]
    table = np.array(rows).reshape(-1, len(names))
    found = {name: interval(law[i], table[:, i]) for i, name in enumerate(names)}
    open_ones = _undetermined(found, float(losses.min()))
    for coefficient, exponent in zip(names[:count], names[count:-1], strict=True):
        if exponent in open_ones:  # what it is multiplied with may be anything, and so it
            found[coefficient] = Interval(None, None, None)
            open_ones[coefficient] = ""
    rms = float(np.sqrt(np.mean(residual**2)))
    notes = [f"the cells do not determine {name}: {why}" for name, why in open_ones.items() if why]
    if "E" not in open_ones and law[-1] < _NONE * losses.min():
        notes.append("E is 0: the cells do not bend towards a floor")
    notes += _disagreements(found, names, project(logs, losses), open_ones)
    if spare == 1 and rms > _EXACT:
        notes.append(f"{cells} cells for {len(names)} parameters: intervals rest on one residual")
    return Fit(
        form=form,
        parameters=found,
        cells=cells,
        inputs=[[float(column.min()), float(column.max())] for column in inputs.T],
        rms_log_residual=rms,
        seed=seed,
        names=names,
        best=law,
        draws=rows,
        notes=notes,
        undetermined=sorted(open_ones, key=names.index),
    )


def _natural(theta: Array, centre: Array) -> list[float]:
    """The coefficients, exponents and E that the fitted numbers stand for."""
    count = len(centre)
    coefficients = np.exp(theta[:count] + theta[count:-1] * centre)
    return [*map(float, coefficients), *map(float, theta[count:-1]), float(np.exp(theta[-1]))]


def _undetermined(found: dict[str, Interval], lowest: float) -> dict[str, str]:
    """Why the cells do not determine an exponent or E, by its name; parameters that they determine
    are left out.

    An exponent is open where it or an end of its interval is at a bound of what is allowed (from 0,
    a law that does not fall, to 3), and either where the interval spans more than half of that.

    Args:
        found: the parameters and their intervals.
        lowest: the loss of the best cell; E is allowed from 0 to that.
    """
    reasons: dict[str, str] = {}
    for name, one in found.items():
        if name in ("A", "B") or one.value is None:
            continue
        exponent = name != "E"
        highest = LARGEST_EXPONENT if exponent else lowest
        low, high = (one.value if end is None else end for end in (one.low, one.high))
        edge = _EDGE * highest
        if exponent and not edge < one.value < highest - edge:
            reasons[name] = f"it is at the bound {_short(one.value)}"
        elif high - low > highest / 2 or (exponent and not edge < low <= high < highest - edge):
            reasons[name] = (
                f"{100 * LEVEL:.0f} % interval {_short(low)} to {_short(high)}, allowed 0 to "
                f"{_short(highest)}"
            )
        elif not exponent and any((found[other].value or 0.0) < edge for other in reasons):
            reasons[name] = "a law that does not fall has no floor"
    return reasons


def _disagreements(
    found: dict[str, Interval], names: list[str], other: Array, open_ones: Container[str]
) -> list[str]:
    """What the second solver finds outside of the intervals, of exponents and E that the cells
    determine."""
    notes = []
    for name, value in zip(names, map(float, other), strict=True):
        low, high = found[name].low, found[name].high
        if name in ("A", "B") or name in open_ones or low is None or high is None:
            continue
        if not low * (1 - _SAME) <= value <= high * (1 + _SAME):
            notes.append(
                f"a second solver (least squares by variable projection) finds {name} "
                f"{_short(value)}, outside of the interval {_short(low)} to {_short(high)}: this "
                "law rests on the method"
            )
    return notes


def _short(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-3 else "0"


def interval(value: float, draws: Array) -> Interval:
    """``value`` and the percentiles of ``draws``, which may be infinite but not NaN."""
    if not len(draws):
        return Interval(finite(value), None, None)
    tail = (1 - LEVEL) / 2
    # no interpolation: between a finite and an infinite draw there is none
    low, high = np.quantile(draws, [tail, 1 - tail], method="closest_observation")
    return Interval(finite(value), finite(low), finite(high))


def finite(value: float) -> float | None:
    """The value itself, or None for numbers that JSON does not have."""
    return float(value) if np.isfinite(value) else None


def rows_of(fit: Fit) -> Array:
    """The fit and its bootstrap samples, as (1 + draws, parameters)."""
    return np.array([fit.best, *fit.draws])


def predict(fit: Fit, *inputs: float) -> Interval:
    """The loss (nats per token) at C FLOPs, or at N parameters and D tokens, with its interval.

    The interval is that of the law, not that of one more run.

    Raises:
        ConfigError: the number of inputs is not that of the form, or one of them is not above 0.
    """
    count = len(fit.inputs)
    if len(inputs) != count or not all(0 < value < np.inf for value in inputs):
        raise ConfigError(f"inputs: got {inputs}; accepted: {count} above 0 ({fit.form})")
    losses = losses_of(rows_of(fit), np.array(inputs))
    return interval(float(losses[0]), losses[1:])


def losses_of(rows: Array, inputs: Array) -> Array:
    """The loss of each row of parameters at one point of ``inputs``."""
    count = len(inputs)
    terms = rows[:, :count] * np.exp(-rows[:, count:-1] * np.log(inputs))
    return np.asarray(rows[:, -1] + terms.sum(axis=1))
