"""The budget at which two depths cost the same for the same loss.

Below it the shallow model ends lower, above it the deep one: growth has something to win near it.
Nothing is assumed of how losses fall with compute. The difference of two runs of one budget and
seed, shallow less deep, is fitted as a polynomial in the logarithm of the budget, and its interval
is the set of budgets at which this difference cannot be told from zero (Fieller 1954, "Some
problems in interval estimation"): with normal noise the true crossing lies in it as often as the
level says, whatever the slope. Where the set reaches the end of the budgets, that end is open.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from megatron_progressive.config import ConfigError
from megatron_progressive.laws.fits import LEVEL, Interval
from megatron_progressive.laws.solver import Array

_POINTS = 4001  # of the budgets' range, for roots and for the set
_CURVED_FROM = 4
"""The number of distinct budgets from which the difference may bend: it is a parabola then, and a
line with fewer."""
LEAST_BUDGETS = 3
"""The least number of distinct budgets."""


@dataclass(frozen=True)
class Crossing:
    """The budget where the shallow model's loss equals the deep one's; :func:`dataclasses.asdict`
    turns it into JSON."""

    compute: Interval
    """The budget in FLOPs, and the ends of its interval. The value is None where the fitted
    difference has no zero among the budgets; an end is None where the interval goes on beyond
    them."""
    lower: str
    """Which model ends lower where there is no crossing: ``shallow``, ``deep``, or ``neither``
    where the cells cannot tell; empty where there is a crossing."""
    budgets: list[float]
    """The least and the greatest budget, in FLOPs."""
    pairs: int
    spread: float
    """The standard deviation of a pair's difference around the fit, in nats per token."""
    coefficients: list[float]
    """The coefficients of the difference in nats per token, as powers of the natural logarithm of
    the budget over ``centre``."""
    centre: float
    """The budget, in FLOPs, around which the polynomial is written."""
    notes: list[str] = field(default_factory=list)

    def difference(self, compute: ArrayLike) -> Array:
        """The fitted loss of the shallow model less that of the deep one, in nats per token."""
        x = np.log(np.asarray(compute, dtype=float) / self.centre)
        return np.asarray(np.polynomial.polynomial.polyval(x, self.coefficients))


def find_crossing(compute: ArrayLike, shallow: ArrayLike, deep: ArrayLike) -> Crossing:
    """The crossing of two depths from pairs of finished runs.

    Args:
        compute: the FLOPs of each pair, which are the same for both of its runs within a step.
        shallow: the final validation loss of the shallow run, in nats per token.
        deep: the final validation loss of the deep run, which has the same seed and data.

    Raises:
        ConfigError: lengths differ, a value is no number above 0, or there are fewer than 3
            distinct budgets.
    """
    budgets, below, above = (np.asarray(v, dtype=float) for v in (compute, shallow, deep))
    if not (budgets.ndim == 1 and budgets.shape == below.shape == above.shape):
        raise ConfigError(
            f"cells: got {budgets.shape} budgets with {below.shape} and {above.shape} losses; "
            "accepted: one loss of each depth a budget"
        )
    for name, values in (("compute", budgets), ("loss", below), ("loss", above)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ConfigError(f"cells: got a {name} that is none; accepted: numbers above 0")
    logs = np.log(budgets)
    different = distinct(budgets)
    if different < LEAST_BUDGETS:
        raise ConfigError(
            f"cells: got {different} distinct budgets; accepted: at least {LEAST_BUDGETS} for a "
            "crossing"
        )
    degree = 2 if different >= _CURVED_FROM else 1
    spare = len(logs) - degree - 1  # at least one, of so many distinct budgets
    centre = float(logs.mean())
    design = np.vander(logs - centre, degree + 1, increasing=True)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ (below - above)
    residual = below - above - design @ coefficients
    spread = float(np.sqrt(residual @ residual / spare))

    line = np.linspace(logs.min(), logs.max(), _POINTS)
    powers = np.vander(line - centre, degree + 1, increasing=True)
    fitted = powers @ coefficients
    error = spread * np.sqrt(np.einsum("pi,ij,pj->p", powers, inverse, powers))
    inside = np.abs(fitted) <= stats.t.ppf(0.5 + LEVEL / 2, spare) * error
    root = _root(line, fitted)
    low, high = _around(line, inside, root)
    notes = []
    if root is None and inside.any():
        notes.append("the fitted difference has no zero, but zero is within its noise")
    if spare == 1:
        notes.append("the noise rests on one residual: more seeds narrow the interval")
    return Crossing(
        compute=Interval(*(None if at is None else float(np.exp(at)) for at in (root, low, high))),
        lower="" if root is not None else _lower(fitted, inside),
        budgets=[float(budgets.min()), float(budgets.max())],
        pairs=len(logs),
        spread=spread,
        coefficients=[float(c) for c in coefficients],
        centre=float(np.exp(centre)),
        notes=notes,
    )


def distinct(compute: ArrayLike) -> int:
    """The number of different budgets in FLOPs; a percent makes none, since budgets are equal
    within a step of the run."""
    return len(np.unique(np.round(np.log(np.asarray(compute, dtype=float)), 2)))


def _root(line: Array, fitted: Array) -> float | None:
    """Where the shallow model's loss rises above the deep one's: a line or a parabola does so
    once at most."""
    changes = np.flatnonzero((fitted[:-1] <= 0) & (fitted[1:] > 0))
    if not len(changes):
        return None
    at = changes[0]
    share = fitted[at] / (fitted[at] - fitted[at + 1])
    return float(line[at] + share * (line[at + 1] - line[at]))


def _around(line: Array, inside: Array, root: float | None) -> tuple[float | None, float | None]:
    """The ends of the connected set of budgets around the root, or of the whole set where there is
    no root."""
    if not inside.any():
        return root, root  # without noise
    if root is None:
        found = np.flatnonzero(inside)
        first, last = int(found[0]), int(found[-1])
    else:
        at = int(np.argmin(np.abs(line - root)))
        if not inside[at]:
            return root, root
        outside = np.flatnonzero(np.logical_not(inside))
        before, after = outside[outside < at], outside[outside > at]
        first = int(before[-1]) + 1 if len(before) else 0
        last = int(after[0]) - 1 if len(after) else len(line) - 1
    low = None if first == 0 else float(line[first])
    high = None if last == len(line) - 1 else float(line[last])
    return low, high


def _lower(fitted: Array, inside: Array) -> str:
    if (fitted > 0).all() and not inside.any():
        return "deep"
    if (fitted < 0).all() and not inside.any():
        return "shallow"
    return "neither"
