"""One run for each fingerprint: cells that are the same run under several names share its
folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_progressive.config import RunConfig
from megatron_progressive.data import DATA_FILE, differ, read_identity
from megatron_progressive.grid.cells import Cell
from megatron_progressive.runs.files import SUMMARY_FILE


def one_a_run(cells: Sequence[Cell]) -> list[Cell]:
    """The first cell of each run."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.run_name, cell)
    return list(first.values())


def share_runs(cells: Sequence[Cell], folder: Path) -> list[Cell]:
    """The cells, where those of one fingerprint have one run: that of the first cell, or the one
    that is already there.

    Args:
        folder: the folder of the study's run folders. A run may lie there under a name that the
            grid had for it before, for example that of a size which was renamed; finished runs go
            before unfinished ones.
    """
    there: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*-*")):
        there.setdefault(_digits(path.name), []).append(path.name)
    runs: dict[str, RunConfig] = {}
    for cell in cells:
        if cell.fingerprint and _digits(cell.run_name) not in runs:
            own = cell.run_name
            known = [
                name
                for name in there.get(_digits(own), [])
                if not differ(read_identity(folder / name / DATA_FILE), cell.trained_on)
            ]
            found = sorted({*known, own}, key=lambda name: _rank(folder / name, own))
            run = replace(cell.config.run, name=found[0])
            runs[_digits(own)] = replace(cell.config, run=run)
    return [replace(c, config=runs[_digits(c.run_name)]) if c.fingerprint else c for c in cells]


def _digits(run_name: str) -> str:
    """The fingerprint that a run folder is named by. It leaves out the content of the data where no
    folder of that name is trained on something else."""
    return run_name.rpartition("-")[2]


def _rank(run: Path, own: str) -> tuple[bool, bool, bool, str]:
    """The rank of a run: finished runs come first, then those that have begun; a run under the
    cell's own name comes before others."""
    return not (run / SUMMARY_FILE).is_file(), not run.is_dir(), run.name != own, run.name
