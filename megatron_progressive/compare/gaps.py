"""The gap of one run to another, in % of the loss."""

from __future__ import annotations

import numpy as np

from megatron_progressive.runs.reading import Run

MIXED_PERCENT = 0.5
"""Gap to the fixed-size run's validation loss at the same step, in %, at and below which a
progressive run has mixed: the largest gap that the paper reports for GPT-2 124M."""


def gap_percent(loss: float, reference: float) -> float:
    """``loss`` above (+) or below (-) ``reference``, in %."""
    return 100 * (loss / reference - 1)


def gap_curve(run: Run, fixed: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which both were validated, and ``run``'s gap there in %."""
    steps, mine, theirs = np.intersect1d(
        run.evals["step"], fixed.evals["step"], assume_unique=True, return_indices=True
    )
    return steps, 100 * (run.evals["loss"][mine] / fixed.evals["loss"][theirs] - 1)
