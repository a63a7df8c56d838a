"""The gap of one run to another, in % of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_progressive.runs.reading import Run

MIXED_PERCENT = 0.5
"""The gap to the fixed-size run's validation loss at the same step, in %, at and below which a
progressive run counts as mixed. It is the largest gap that the paper reports for GPT-2 124M."""


def gap_percent(loss: float, reference: float) -> float:
    """How far ``loss`` is above (+) or below (-) ``reference``, in %."""
    return 100 * (loss / reference - 1)


def has_loss(run: Run) -> bool:
    """Whether a run's final validation loss is a number above zero; otherwise the run has
    diverged."""
    return run.final_loss is not None and math.isfinite(run.final_loss) and run.final_loss > 0


def gap_curve(run: Run, fixed: Run) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which both runs were validated, and the gap of ``run`` at each of them in %."""
    steps, mine, theirs = np.intersect1d(
        run.evals["step"], fixed.evals["step"], assume_unique=True, return_indices=True
    )
    return steps, 100 * (run.evals["loss"][mine] / fixed.evals["loss"][theirs] - 1)


@dataclass(frozen=True)
class EqualLoss:
    """Where the fixed-size run first has the progressive run's final validation loss."""

    step: int
    flops: float
    compute_ratio: float
    """The FLOPs of the fixed-size run there over the progressive run's total; above 1 progressive
    was cheaper."""
    lr_fraction: float
    """The learning rate of the fixed-size run there over its peak. Near 1 it has not decayed, which
    costs it loss."""


def equal_loss(run: Run, fixed: Run) -> EqualLoss | None:
    """Where the fixed-size run is as good as ``run`` at its end; None where it never is."""
    if run.final_loss is None or not run.total_flops:
        return None
    reached = np.flatnonzero(fixed.evals["loss"] <= run.final_loss)
    if not len(reached):
        return None
    step, flops = fixed.evals["step"][reached[0]], float(fixed.evals["flops"][reached[0]])
    at = np.flatnonzero(fixed.train["step"] == step)
    peak = fixed.config.optim.lr
    return EqualLoss(
        step=int(step),
        flops=flops,
        compute_ratio=flops / run.total_flops,
        lr_fraction=float(fixed.train["lr"][at[0]]) / peak if len(at) and peak else float("nan"),
    )
