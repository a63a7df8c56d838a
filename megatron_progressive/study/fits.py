"""Scaling-law fits of an arm's finished runs.

Two forms, with natural logarithms throughout:

- ``L = E + A / C^alpha`` over training FLOPs C (:func:`fit_compute`);
- ``L = E + A / N^alpha + B / D^beta`` over parameters N and tokens D (:func:`fit_size_tokens`).

The procedure is that of Hoffmann et al. 2022 (arXiv 2203.15556), appendix D.2: a Huber loss with
delta = 1e-3 of the difference in *log* loss, the log of the sum taken as a log-sum-exp of its
terms, minimised by L-BFGS from a grid of starts of which the best is kept. Logarithms of C, N and
D are centred first, which changes the conditioning and not the optimum.

Intervals are percentiles of a bootstrap that draws every cell's log loss anew around the fit, with
normal noise of the cells' own spread, itself drawn from its chi-squared distribution with as many
degrees of freedom as there are cells beyond parameters. Drawing cells with replacement instead
would say too much of the few cells that studies have: with four, intervals of 95 % held the known
efficiency in 68 % of 25 pairs of synthetic arms, against 96 % this way. An outlier, which hardly
moves the fit, widens them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import huber

from megatron_progressive.config import ConfigError

DELTA = 1e-3
"""Residual of log loss at which the objective turns from quadratic to linear (appendix D.2)."""

LEVEL = 0.95
"""Nominal coverage of every interval."""

DRAWS = 400
"""Bootstrap samples."""

_LARGEST_EXPONENT = 3.0
_START_EXPONENTS = (0.05, 0.2, 0.6, 1.2)
_START_FLOORS = (0.3, 0.7, 0.95)  # E of a start, as a share of the lowest loss
_NAMES = {1: ("A", "alpha", "E"), 2: ("A", "B", "alpha", "beta", "E")}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A number and its bootstrap interval; None stands for one that has no finite value."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Fit:
    """One fitted law; :func:`dataclasses.asdict` of it is JSON."""

    form: str
    """``compute`` or ``size_tokens``."""
    parameters: dict[str, Interval]
    """``E``, ``A``, ``alpha`` (and ``B``, ``beta``); losses in nats per token."""
    cells: int
    inputs: list[list[float]]
    """Least and greatest of each input among the cells: beyond them the law extrapolates."""
    rms_log_residual: float
    """Root mean square of log predicted loss minus log loss."""
    seed: int
    """Of the bootstrap."""
    names: list[str]
    """Of a row of ``draws``."""
    best: list[float]
    """The fit itself, in the order of ``names``."""
    draws: list[list[float]]
    """The same of each bootstrap sample."""
    notes: list[str] = field(default_factory=list)
    """What the cells cannot tell."""


def fit_compute(compute: ArrayLike, loss: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Fit:
    """Fit ``L = E + A / C^alpha``.

    Args:
        compute: training FLOPs of each cell.
        loss: its final validation loss, nats per token.
        draws: bootstrap samples.
        seed: of the bootstrap.

    Raises:
        ConfigError: lengths differ, a value is not above 0, or fewer than 4 distinct computes
            (one more than there are parameters).
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
        size: parameters N of each cell.
        tokens: training tokens D of each cell.
        loss: its final validation loss, nats per token.

    Raises:
        ConfigError: lengths differ, a value is not above 0, fewer than 6 distinct (N, D), fewer
            than 3 distinct N or D, or tokens that follow from the size in every cell, so that
            the two terms cannot be told apart.
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
    """Inputs as (cells, inputs) and losses as (cells,)."""
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


def _objective(theta: Array, logs: Array, log_loss: Array) -> tuple[float, Array]:
    """Huber loss over delta^2 and its gradient.

    Args:
        theta: (log coefficients, exponents, log E), of k + k + 1 numbers.
        logs: centred logarithms of the inputs, (cells, k).
    """
    count = logs.shape[1]
    terms = np.empty((len(logs), count + 1))
    terms[:, :count] = theta[:count] - theta[count:-1] * logs
    terms[:, count] = theta[-1]
    predicted = np.logaddexp.reduce(terms, axis=1)
    # over delta: the minimiser's tolerances are absolute near 1
    residual = (predicted - log_loss) / DELTA
    slope = np.clip(residual, -1, 1) / DELTA
    shares = slope[:, None] * np.exp(terms - predicted[:, None])
    gradient = np.concatenate(
        [shares[:, :count].sum(0), -(shares[:, :count] * logs).sum(0), [shares[:, count].sum()]]
    )
    return float(huber(1.0, residual).sum()), gradient


def _minimum(starts: Sequence[Array], logs: Array, log_loss: Array, tolerance: float) -> Array:
    """The best of the local optima reached from ``starts``."""
    count = logs.shape[1]
    bounds = [(None, None)] * count + [(0.0, _LARGEST_EXPONENT)] * count
    # log-sum-exp needs some E; that small it is none
    bounds += [(float(log_loss.min()) - 12, float(log_loss.max()))]
    found = [
        minimize(
            _objective, start, (logs, log_loss), "L-BFGS-B", jac=True, bounds=bounds,
            options={"maxiter": 2000, "maxfun": 4000, "ftol": tolerance, "gtol": 1e-7},
        )
        for start in starts
    ]  # fmt: skip
    return np.asarray(min(found, key=lambda one: float(one.fun)).x)


def _starts(logs: Array, log_loss: Array) -> list[Array]:
    """A grid over exponents and E, with coefficients that put the centre of the cells right."""
    count, losses = logs.shape[1], np.exp(log_loss)
    starts = []
    for floor in _START_FLOORS:
        rest = np.log((np.median(losses) - floor * losses.min()) / count)
        for exponents in itertools.product(_START_EXPONENTS, repeat=count):
            log_floor = np.log(floor * losses.min())
            starts.append(np.array([*[rest] * count, *exponents, log_floor]))
    return starts


def _fit(form: str, inputs: Array, losses: Array, draws: int, seed: int) -> Fit:
    cells, count = inputs.shape
    centre = np.log(inputs).mean(axis=0)
    logs, log_loss = np.log(inputs) - centre, np.log(losses)
    best = _minimum(_starts(logs, log_loss), logs, log_loss, 1e-13)
    random = np.random.default_rng(seed)
    predicted = np.logaddexp.reduce(
        np.column_stack([best[:count] - best[count:-1] * logs, np.full(cells, best[-1])]), axis=1
    )
    residual = log_loss - predicted
    spare = cells - len(best)
    sampled = []
    for _ in range(draws):
        spread = np.sqrt(residual @ residual / random.chisquare(spare))
        drawn = predicted + spread * random.standard_normal(cells)
        sampled.append(_minimum([best], logs, drawn, 1e-9))
    names, law = list(_NAMES[count]), _natural(best, centre)
    rows = [_natural(theta, centre) for theta in sampled]
    table = np.array(rows).reshape(-1, len(names))
    return Fit(
        form=form,
        parameters={name: interval(law[i], table[:, i]) for i, name in enumerate(names)},
        cells=cells,
        inputs=[[float(column.min()), float(column.max())] for column in inputs.T],
        rms_log_residual=float(np.sqrt(np.mean(residual**2))),
        seed=seed,
        names=names,
        best=law,
        draws=rows,
        notes=_notes(best, names, count, float(log_loss.min())),
    )


def _natural(theta: Array, centre: Array) -> list[float]:
    """Coefficients, exponents and E from the fitted numbers."""
    count = len(centre)
    coefficients = np.exp(theta[:count] + theta[count:-1] * centre)
    return [*map(float, coefficients), *map(float, theta[count:-1]), float(np.exp(theta[-1]))]


def _notes(theta: Array, names: list[str], count: int, lowest: float) -> list[str]:
    notes = []
    for name, exponent in zip(names[count:-1], theta[count:-1], strict=True):
        if not 1e-6 < exponent < _LARGEST_EXPONENT - 1e-6:
            notes.append(f"{name} is at the bound {exponent:g}: the cells do not determine it")
    if theta[-1] < lowest - 11:
        notes.append("E is 0: the cells do not bend towards a floor")
    return notes


def interval(value: float, draws: Array) -> Interval:
    """``value`` and the percentiles of ``draws``, which may be infinite but not NaN."""
    if not len(draws):
        return Interval(finite(value), None, None)
    tail = (1 - LEVEL) / 2
    # no interpolation: between a finite and an infinite draw there is none
    low, high = np.quantile(draws, [tail, 1 - tail], method="closest_observation")
    return Interval(finite(value), finite(low), finite(high))


def finite(value: float) -> float | None:
    """``value``, or None for what JSON has no number for."""
    return float(value) if np.isfinite(value) else None


def rows_of(fit: Fit) -> Array:
    """The fit and its bootstrap samples, (1 + draws, parameters)."""
    return np.array([fit.best, *fit.draws])


def predict(fit: Fit, *inputs: float) -> Interval:
    """Loss (nats per token) at FLOPs C, or at N parameters and D tokens, with its interval.

    The interval is of the law, not of one more run.

    Raises:
        ConfigError: another number of inputs than the form has, or one that is not above 0.
    """
    count = len(fit.inputs)
    if len(inputs) != count or not all(0 < value < np.inf for value in inputs):
        raise ConfigError(f"inputs: got {inputs}; accepted: {count} above 0 ({fit.form})")
    losses = losses_of(rows_of(fit), np.array(inputs))
    return interval(float(losses[0]), losses[1:])


def losses_of(rows: Array, inputs: Array) -> Array:
    """Loss of each row of parameters at one point of ``inputs``."""
    count = len(inputs)
    terms = rows[:, :count] * np.exp(-rows[:, count:-1] * np.log(inputs))
    return np.asarray(rows[:, -1] + terms.sum(axis=1))
