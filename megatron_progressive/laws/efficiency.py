"""What one arm saves against another: the compute at equal loss, and the frontier of both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression

from megatron_progressive.config import ConfigError
from megatron_progressive.laws.fits import (
    Fit,
    Interval,
    finite,
    interval,
    losses_of,
    rows_of,
)
from megatron_progressive.laws.solver import Array

_ROUNDING = 1e-9  # of a logarithm: the largest cell's own FLOPs are not beyond it


@dataclass(frozen=True)
class Efficiency:
    """The compute of one arm against that of another at equal loss."""

    loss: float | None
    """The loss, in nats per token."""
    compute: float | None
    """The FLOPs with which the reference arm has this loss."""
    factor: Interval
    """The reference's FLOPs over the arm's: above 1 the arm is cheaper. It is 0 where the arm never
    has this loss, and None where the reference never has it."""
    extrapolated: bool
    """Whether the loss lies outside of what either arm has measured."""


def _log_computes(rows: Array, losses: Array) -> Array:
    """The logarithm of the FLOPs with which each row of (A, alpha, E) has each loss; infinite where
    it never has that loss."""
    above, alpha = losses - rows[:, 2], rows[:, 1]
    reached = (above > 0) & (alpha > 0) & (rows[:, 0] > 0)
    found = np.full(len(rows), np.inf)
    found[reached] = (np.log(rows[reached, 0]) - np.log(above[reached])) / alpha[reached]
    return found


def efficiency_at_loss(arm: Fit, reference: Fit, loss: float) -> Efficiency:
    """Compute efficiency of ``arm`` against ``reference`` at a loss in nats per token:
    C_reference(L) / C_arm(L), both from fits over compute.

    Raises:
        ConfigError: a fit has another form, or the loss is not above 0.
    """
    if not 0 < loss < np.inf:
        raise ConfigError(f"loss: got {loss}; accepted: a number above 0")
    rows, other = _paired(arm, reference)
    return _efficiency(arm, reference, rows, other, np.full(len(rows), loss))


def efficiency_at_compute(arm: Fit, reference: Fit, compute: float) -> Efficiency:
    """The compute efficiency at the loss that ``reference`` has with ``compute`` FLOPs. With the
    FLOPs of the reference's run of each size it gives the efficiency as a function of size.

    Raises:
        ConfigError: a fit has another form, or the compute is not above 0.
    """
    if not 0 < compute < np.inf:
        raise ConfigError(f"compute: got {compute}; accepted: a number above 0")
    rows, other = _paired(arm, reference)
    # each sample has its own loss at this compute: its uncertainty is part of the factor's
    losses = losses_of(other, np.array([compute]))
    return _efficiency(arm, reference, rows, other, losses, compute)


def _paired(arm: Fit, reference: Fit) -> tuple[Array, Array]:
    for fit in (arm, reference):
        if fit.form != "compute":
            raise ConfigError(f"form: got {fit.form}; accepted: compute")
    pairs = 1 + min(len(arm.draws), len(reference.draws))
    rows, other = rows_of(arm)[:pairs], rows_of(reference)[:pairs]
    # both bootstraps may have had the same seed: equal draws must not meet, or their noise cancels
    other[1:] = np.roll(other[1:], 1, axis=0)
    return rows, other


def _efficiency(
    arm: Fit, reference: Fit, rows: Array, other: Array, losses: Array,
    compute: float | None = None,
) -> Efficiency:  # fmt: skip
    # as logarithms: a law that hardly falls has a loss with 0 FLOPs, or with more than there are
    mine = _log_computes(rows, losses)
    theirs = (
        _log_computes(other, losses) if compute is None else np.full(len(rows), np.log(compute))
    )
    # where neither has the loss there is no factor: such samples count for neither side
    known = np.isfinite(mine) | np.isfinite(theirs)
    factors = np.full(len(rows), np.nan)
    with np.errstate(over="ignore"):
        factors[known] = np.exp(theirs[known] - mine[known])
        at_reference = compute or float(np.exp(theirs[0]))
    draws = factors[1:]
    inside = all(
        np.log(fit.inputs[0][0]) - _ROUNDING <= at <= np.log(fit.inputs[0][1]) + _ROUNDING
        for fit, at in ((arm, mine[0]), (reference, theirs[0]))
    )
    return Efficiency(
        loss=finite(losses[0]),
        compute=finite(at_reference),
        factor=interval(float(factors[0]), draws[~np.isnan(draws)]),
        extrapolated=not inside,
    )


@dataclass(frozen=True)
class Multiplier:
    """The compute multiplier between measured cells, without a law and without an interval."""

    value: float | None
    """The reference's FLOPs over the arm's at equal loss; None where it lies outside of what either
    arm has measured."""
    at_least: float | None = None
    """What it is above, where the arm is below that loss with its fewest FLOPs."""
    at_most: float | None = None
    """What it is below, where the arm is above that loss with its most FLOPs."""
    why: str = ""
    """Why it is not known, in words; empty where it is."""


def interpolated_factor(
    compute: ArrayLike, loss: ArrayLike, reference_compute: ArrayLike, reference_loss: ArrayLike,
    at: float,
) -> Multiplier:  # fmt: skip
    """The compute multiplier without a law: C_reference(L) / C_arm(L) at the loss L that the
    reference has with ``at`` FLOPs, between measured cells.

    Each arm is the line through its cells in log FLOPs and log loss, cells of equal FLOPs
    averaged, and falls: where a larger budget ended higher, both ends of that piece are averaged
    (isotonic regression).

    Args:
        compute, loss: of the arm's cells, FLOPs and nats per token.
        reference_compute, reference_loss: of the reference's.
        at: FLOPs, within the reference's.
    """
    if not (len(np.atleast_1d(compute)) and len(np.atleast_1d(reference_compute))):
        return Multiplier(None, why="no cell of one of both is finished")
    (logs, losses), reference = _line(compute, loss), _line(reference_compute, reference_loss)
    if len(logs) < 2:
        return Multiplier(None, why="its cells have one number of FLOPs, no line between them")
    if not reference[0][0] - _ROUNDING <= np.log(at) <= reference[0][-1] + _ROUNDING:
        return Multiplier(None, why="the reference has no cells around these FLOPs")
    wanted = float(np.interp(np.log(at), *reference))
    if wanted > losses[0] + _ROUNDING:
        least = float(at / np.exp(logs[0]))
        return Multiplier(None, at_least=least, why="it is below that loss at its fewest FLOPs")
    if wanted < losses[-1] - _ROUNDING:
        most = float(at / np.exp(logs[-1]))
        return Multiplier(None, at_most=most, why="it is above that loss at its most FLOPs")
    # np.interp wants rising ones; of a flat piece the cheapest budget counts
    keep = np.concatenate([[True], np.diff(losses) < 0])
    mine = float(np.interp(-wanted, -losses[keep], logs[keep]))
    return Multiplier(float(np.exp(np.log(at) - mine)))


def _line(compute: ArrayLike, loss: ArrayLike) -> tuple[Array, Array]:
    """Log FLOPs in rising order, and the log loss that falls with them."""
    computes, losses = np.asarray(compute, dtype=float), np.log(np.asarray(loss, dtype=float))
    # cells of one size at several seeds have the same FLOPs
    distinct, group = np.unique(np.round(np.log(computes), 6), return_inverse=True)
    counts = np.bincount(group)
    means = np.bincount(group, weights=losses) / counts
    fitted = isotonic_regression(means, weights=counts, increasing=False).x
    return distinct, np.asarray(fitted, dtype=float)


def pareto(compute: ArrayLike, loss: ArrayLike) -> list[int]:
    """The indices of the points than which no other is lower in both compute and loss, by compute.

    A point is left out where another one has at most its compute and at most its loss (of equal
    points the first one stays), and where its loss is not a number.
    """
    computes, losses = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
    lowest, kept = np.inf, []
    for index in np.lexsort((losses, computes)):
        if losses[index] < lowest and np.isfinite(computes[index]):
            lowest = losses[index]
            kept.append(int(index))
    return kept
