"""Many fits of a scaling law at once: one form, fitted to several sets of losses of the same cells.

A bootstrap fits one law some hundred times. Minimisers that take one problem at a time need a
minute for that where cells are noisy; here all problems step together as arrays. What is minimised
is Hoffmann et al.'s (arXiv 2203.15556, appendix D.2): the Huber loss of log predicted loss minus
log loss, over ``delta^2`` so that tolerances are near 1.

The step is Levenberg and Marquardt's (More 1978, doi 10.1007/BFb0067700) on the quadratic that
touches the Huber loss from above (iteratively reweighted least squares; Huber and Ronchetti 2009,
section 7.8), with bounds by leaving a parameter out while it is pressed against one. Starts come
from what is linear in the law: given the exponents, the loss is linear in the coefficients and E
(variable projection, Golub and Pereyra 1973), so a grid over the exponents alone finds the valley.

``theta`` is (log coefficients, exponents, log E) for inputs whose logarithms are centred: k + k + 1
numbers for k inputs.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DELTA = 1e-3
"""The residual of log loss at which the objective turns from quadratic to linear (appendix D.2)."""

LARGEST_EXPONENT = 3.0

NO_FLOOR = 12.0
"""How far below the log of the lowest loss a log E lies that stands for no E, since log-sum-exp
needs some number."""

_START_EXPONENTS = (0.05, 0.2, 0.6, 1.2)
_START_FLOORS = (0.3, 0.7, 0.95)  # E of a start, as a share of the lowest loss
_SCREENED = {1: np.geomspace(0.02, LARGEST_EXPONENT, 40), 2: np.geomspace(0.02, 2.0, 14)}
_STEPS = 300
_LONGEST = 3.0  # of a step, in any parameter
_QUIET = 4  # steps in a row that gain nothing


def residuals(theta: Array, logs: Array, log_loss: Array) -> tuple[Array, Array]:
    """Log predicted loss minus log loss, [problems, cells], and the share of each term in the
    predicted loss, [problems, cells, k + 1].

    Args:
        theta: the parameters, [problems, 2 k + 1].
        logs: centred logarithms of the inputs, [cells, k].
        log_loss: the logarithms of the losses, [problems, cells] or [cells].
    """
    count = logs.shape[1]
    terms = np.empty((len(theta), len(logs), count + 1))
    terms[..., :count] = theta[:, None, :count] - theta[:, None, count:-1] * logs
    terms[..., count] = theta[:, None, -1]
    highest = terms.max(axis=-1, keepdims=True)
    shares = np.exp(terms - highest)
    sums = shares.sum(axis=-1, keepdims=True)
    return (highest + np.log(sums))[..., 0] - log_loss, shares / sums


def objective(residual: Array) -> Array:
    """The Huber loss over ``delta^2``, summed over cells."""
    size = np.abs(residual) / DELTA
    return np.asarray(np.where(size <= 1, 0.5 * size * size, size - 0.5).sum(axis=-1))


def bounds(log_loss: Array, count: int) -> tuple[Array, Array]:
    """The least and the greatest ``theta``, [problems, 2 k + 1]: exponents from 0 to 3, E below the
    highest loss."""
    low = np.full((len(log_loss), 2 * count + 1), -np.inf)
    high = -low
    low[:, count:-1], high[:, count:-1] = 0.0, LARGEST_EXPONENT
    low[:, -1], high[:, -1] = log_loss.min(axis=1) - NO_FLOOR, log_loss.max(axis=1)
    return low, high


def minimise(starts: Array, logs: Array, log_loss: Array, tolerance: float) -> tuple[Array, Array]:
    """A local optimum from each start, and the objective there.

    Args:
        starts: the starts, [problems, 2 k + 1], which are brought within the bounds.
        logs: centred logarithms of the inputs, [cells, k].
        log_loss: the logarithms of the losses, [problems, cells].
        tolerance: a gain of a step that counts as none, relative to 1 + the objective.
    """
    count = logs.shape[1]
    low, high = bounds(log_loss, count)
    theta = np.clip(starts, low, high)
    residual, shares = residuals(theta, logs, log_loss)
    value = objective(residual)
    damping, quiet = np.full(len(theta), 1e-2), np.zeros(len(theta), dtype=int)
    live = np.arange(len(theta))
    for _ in range(_STEPS):
        if not len(live):
            break
        step = _step(theta[live], residual[live], shares[live], logs, damping[live],
                     low[live], high[live])  # fmt: skip
        tried = np.clip(theta[live] + step, low[live], high[live])
        found, found_shares = residuals(tried, logs, log_loss[live])
        found_value = objective(found)
        better = found_value < value[live]
        gain = np.where(better, value[live] - found_value, 0.0)
        quiet[live] = np.where(gain > tolerance * (1 + value[live]), 0, quiet[live] + 1)
        damping[live] = np.clip(damping[live] * np.where(better, 0.3, 4.0), 1e-9, 1e9)
        taken = live[better]
        theta[taken], value[taken] = tried[better], found_value[better]
        residual[taken], shares[taken] = found[better], found_shares[better]
        live = live[quiet[live] < _QUIET]
    return theta, value


def _step(
    theta: Array, residual: Array, shares: Array, logs: Array, damping: Array, low: Array,
    high: Array,
) -> Array:  # fmt: skip
    count, size = logs.shape[1], theta.shape[1]
    jacobian = np.concatenate(
        [shares[..., :count], -shares[..., :count] * logs, shares[..., count:]], axis=-1
    )
    weights = 1 / np.maximum(1.0, np.abs(residual) / DELTA)
    weighted = np.swapaxes(jacobian * weights[..., None], 1, 2)
    gradient = (weighted @ residual[..., None])[..., 0]
    normal = weighted @ jacobian
    fast = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    gradient[fast] = 0.0
    normal[fast[:, :, None] | fast[:, None, :]] = 0.0
    diagonal = np.einsum("bpp->bp", normal)
    largest = np.maximum(diagonal.max(axis=1, keepdims=True), 1e-300)
    scale = np.maximum(diagonal, 1e-12 * largest)
    at = np.arange(size)
    normal[:, at, at] += np.where(fast, largest, damping[:, None] * scale)
    step = -np.linalg.solve(normal, gradient[..., None])[..., 0]
    return np.clip(step, -_LONGEST, _LONGEST)


def grid_starts(logs: Array, log_loss: Array) -> Array:
    """Starts for one set of losses [cells]: a grid over exponents and E, with coefficients that
    put the centre of the cells right."""
    count, losses = logs.shape[1], np.exp(log_loss)
    starts = []
    for floor in _START_FLOORS:
        rest = np.log((np.median(losses) - floor * losses.min()) / count)
        for exponents in itertools.product(_START_EXPONENTS, repeat=count):
            starts.append([*[rest] * count, *exponents, np.log(floor * losses.min())])
    return np.array(starts)


def projected_starts(logs: Array, log_loss: Array) -> Array:
    """The best start, [problems, 2 k + 1], of each set of losses [problems, cells], by variable
    projection.

    For each point of a grid over the exponents, relative losses are fitted linearly, with a floor
    and without one; of the fits with coefficients above 0 the one with the least squares is kept.
    """
    count = logs.shape[1]
    starts = np.empty((len(log_loss), 2 * count + 1))
    if not len(starts):
        return starts
    losses = np.exp(log_loss)
    scale = np.exp(log_loss.mean(axis=0))  # one for all sets: one factorisation for all
    wanted = losses / scale
    lowest = log_loss.min(axis=1) - NO_FLOOR
    best = np.full(len(losses), np.inf)
    starts[:, :count], starts[:, count:-1] = np.log(losses.mean(axis=1) / count)[:, None], 0.1
    starts[:, -1] = lowest
    for point in map(np.array, itertools.product(_SCREENED[count], repeat=count)):
        terms = np.exp(-point * logs)
        for floor in (True, False):
            columns = np.column_stack([terms, np.ones(len(logs))]) if floor else terms
            design = columns / scale[:, None]
            solution = wanted @ np.linalg.pinv(design).T
            squares = ((solution @ design.T - wanted) ** 2).sum(axis=1)
            taken = (squares < best) & (solution > 0).all(axis=1)
            best[taken] = squares[taken]
            starts[taken, :count] = np.log(solution[taken, :count])
            starts[taken, count:-1] = point
            starts[taken, -1] = np.log(solution[taken, -1]) if floor else lowest[taken]
    return starts


def best_of(starts: Array, logs: Array, log_loss: Array, tolerance: float = 1e-10) -> Array:
    """The best optimum, [problems, 2 k + 1], of each set of losses [problems, cells] from its
    starts [problems, starts, 2 k + 1]. ``tolerance`` is that of :func:`minimise`."""
    problems, each, size = starts.shape
    theta, value = minimise(
        starts.reshape(-1, size), logs, np.repeat(log_loss, each, axis=0), tolerance
    )
    chosen = value.reshape(problems, each).argmin(axis=1)
    return np.asarray(theta.reshape(problems, each, size)[np.arange(problems), chosen])
