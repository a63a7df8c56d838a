"""What a comparison of runs found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_progressive.compare.arms import Missing
from megatron_progressive.compare.rows import Row
from megatron_progressive.compare.verdict import Verdict
from megatron_progressive.evaluation.results import TaskRow


@dataclass(frozen=True)
class Report:
    """The content of ``report.json``."""

    title: str
    complete: bool
    """Whether each progressive run has all its controls, and all are finished."""
    rows: list[Row]
    verdicts: list[Verdict]
    missing: list[Missing]
    tasks: list[TaskRow] = field(default_factory=list)
    """The scores of the runs' checkpoints on downstream tasks."""
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    """The files that were written, the page first."""
