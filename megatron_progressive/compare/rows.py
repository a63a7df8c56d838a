"""The table of a report, with one row for each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_progressive.compare.arms import Comparison
from megatron_progressive.compare.gaps import gap_percent
from megatron_progressive.compare.validated import Validated, validated
from megatron_progressive.runs.reading import Run
from megatron_progressive.runtime.text import flops_text, short_counts, time_text


@dataclass(frozen=True)
class Row:
    """One run in the table."""

    name: str
    folder: str
    arm: str
    seed: int
    layers: list[int]
    """The number of layers in each phase."""
    params: list[int]
    """The number of parameters in each phase."""
    steps: int
    """The number of steps that the run is to have."""
    steps_done: int
    tokens: int
    """The number of tokens seen so far; for models of images, of images."""
    unit: str
    """What ``tokens`` counts: ``tokens`` or ``images``."""
    total_flops: float | None
    final_eval_loss: float | None
    train_wall_s: float | None
    """Seconds of training steps and expansion pauses."""
    wall_s: float | None
    """Seconds from start to end, including validations and saves."""
    gap_to_fixed_percent: float | None
    finished: bool
    expansions: list[dict[str, Any]]
    warnings: list[str]
    validation: Validated = field(default_factory=dict)
    """What the last validation found on each set."""


def make_row(run: Run, arm: str, comparisons: Sequence[Comparison]) -> Row:
    """The row of one run; its gap is that to the fixed-size run of its comparison."""
    fixed = next(
        (
            c.fixed
            for c in comparisons
            if c.fixed is not None and run in (c.progressive, c.short, *c.never)
        ),
        None,
    )
    gap = None
    if fixed is not None and run.final_loss is not None and fixed.final_loss:
        gap = gap_percent(run.final_loss, fixed.final_loss)
    summary = run.summary or {}
    return Row(
        name=run.name,
        folder=str(run.folder),
        arm=arm,
        seed=run.config.run.seed,
        layers=run.depths,
        params=run.params,
        steps=run.config.last_step,
        steps_done=run.last_step,
        tokens=run.last_step * run.step_tokens,
        unit=run.unit,
        total_flops=run.total_flops,
        final_eval_loss=run.final_loss,
        train_wall_s=run.train_wall,
        wall_s=summary.get("wall_s"),
        gap_to_fixed_percent=gap,
        finished=run.finished,
        expansions=run.expansions,
        warnings=run.warnings,
        validation=validated(run),
    )


HEADER = (
    "arm", "run", "layers", "params", "steps", "tokens", "FLOPs", "eval loss", "time",
    "vs fixed",
)  # fmt: skip


def header(rows: Sequence[Row]) -> list[str]:
    """:data:`HEADER`, in which what the rows' models are trained on stands in place of tokens."""
    units = " or ".join(dict.fromkeys(row.unit for row in rows)) or "tokens"
    return [units if name == "tokens" else name for name in HEADER]


def _measured(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def table_cells(row: Row) -> list[str]:
    """The texts of one run, in the order of :data:`HEADER`."""
    steps = f"{row.steps:,}" if row.finished else f"{row.steps_done:,}/{row.steps:,}"
    unmeasured = "diverged" if row.finished else "unfinished"
    return [
        row.arm,
        row.name,
        " → ".join(str(depth) for depth in row.layers),
        " → ".join(short_counts(row.params)),
        steps,
        short_counts([row.tokens])[0],
        "–" if row.total_flops is None else flops_text(row.total_flops),
        f"{row.final_eval_loss:.4f}" if _measured(row.final_eval_loss) else unmeasured,
        "–" if row.train_wall_s is None else time_text(row.train_wall_s),
        "–" if row.gap_to_fixed_percent is None else f"{row.gap_to_fixed_percent:+.2f} %",
    ]
