"""The honest test of a law: fit it without the largest size and predict that size.

OLMo-core's model ladder does the same. A law that cannot predict the next size on a ladder says
nothing of sizes beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_progressive.laws.fits import DRAWS, Interval, fit_compute, predict


@dataclass(frozen=True)
class Rollout:
    """What a law of all sizes but the largest predicts of the largest."""

    compute: float
    """The mean FLOPs of the largest size's cells."""
    measured: float
    """The mean of their losses, in nats per token."""
    predicted: Interval
    """The loss that the law predicts, in nats per token."""
    cells: int
    """The number of cells to which the law was fitted."""

    @property
    def error_percent(self) -> float | None:
        """The predicted loss less the measured one, in percent of the measured one."""
        if self.predicted.value is None:
            return None
        return 100 * (self.predicted.value / self.measured - 1)

    @property
    def inside(self) -> bool | None:
        """Whether the measured loss is inside the interval of the prediction; None where an end of
        that is open. The interval is the law's, and narrower than that of one more run."""
        low, high = self.predicted.low, self.predicted.high
        return None if low is None or high is None else low <= self.measured <= high


def rollout(compute: ArrayLike, loss: ArrayLike, size: ArrayLike, *, draws: int = DRAWS) -> Rollout:
    """Fit ``L = E + A / C^alpha`` to all sizes but the largest and predict its loss.

    Args:
        compute: the training FLOPs of each cell.
        loss: the final validation loss of each cell, in nats per token.
        size: the number of parameters of each cell.

    Raises:
        ConfigError: the cells that are left are too few for a law (:func:`.fits.fit_compute`).
    """
    computes, losses, sizes = (np.asarray(v, dtype=float) for v in (compute, loss, size))
    largest = sizes == sizes.max()
    rest = np.logical_not(largest)
    fit = fit_compute(computes[rest], losses[rest], draws=draws)
    at = float(computes[largest].mean())
    return Rollout(at, float(losses[largest].mean()), predict(fit, at), int(rest.sum()))
