"""A study's folder: how far its cells are, and what they have found.

The study's folder holds ``cells/`` (run folders), ``configs/``, ``logs/``, ``attempts/`` (one JSON
file for each cell with tries, last error and version of the code), ``locks/`` and, where the grid
has one, the ``pilot/``. A finished cell is one whose run folder has a ``summary.json`` of its last
step; nothing else makes it so, and only deleting that folder makes it run again.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_progressive import __version__
from megatron_progressive.config.places import check_paths, check_writable
from megatron_progressive.grid.cells import Cell, params_of
from megatron_progressive.grid.crossing import WAITS as CROSSING_WAITS
from megatron_progressive.grid.grid import Grid
from megatron_progressive.grid.pilot import WAITS
from megatron_progressive.runs.files import is_finished, read_summary
from megatron_progressive.runtime.files import write_json
from megatron_progressive.runtime.folder_lock import (
    LOCK_NAME,
    FolderInUse,
    FolderLock,
    Owner,
    owner_of,
)

FINISHED, RUNNING, FAILED, STARTED, WAITING = "finished", "running", "failed", "started", "waiting"
PENDING, NO_TAU = "waits for pilot", "no τ"
NO_CROSSING = "no crossing"
NOT_YET = {WAITS: PENDING, CROSSING_WAITS: CROSSING_WAITS}
"""The states of cells that wait for others to end, by why they are not known."""
NEVER_RUN = (NO_TAU, NO_CROSSING)
"""The states of cells that are not run, because others say that there is nothing to run."""
_RESULTS = ("final_eval_loss", "total_flops", "total_tokens", "train_wall_s", "steps", "num_layers")
_TAIL = 8192  # bytes from the end of a metrics file, which hold its last lines


@dataclass(frozen=True)
class Attempts:
    """What is known of the tries of a cell."""

    failures: int = 0
    """The number of failures of its own."""
    error: str = ""
    """Why the last try of a cell that is not finished ended; that need not have been the cell's own
    fault (:mod:`.failures`)."""
    version: str = ""
    """The version of the code that finished it, or tried it last."""


@dataclass(frozen=True)
class CellStatus:
    """How far a cell has come."""

    cell: Cell
    state: str
    attempts: Attempts
    step: int
    """The number of steps that its metrics have."""
    flops: float
    """The training FLOPs of those steps."""
    flops_per_s: float | None
    """The FLOPs per second of its last step, or of all of a finished cell including validations and
    saves; None where it has none."""
    loss: float | None
    """The final validation loss of a finished cell."""

    @property
    def why(self) -> str:
        """Why a cell is not finished, or why it failed before."""
        return self.attempts.error or self.cell.unknown


def code_version() -> str:
    """The package's version, with the commit where it runs from a clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{__version__} ({found.stdout.strip()})" if found.returncode == 0 else __version__


class Study:
    """A grid and its folder."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.folder = grid, grid.folder

    def check_places(self) -> None:
        """Check that the study's folder can be written to, and that what its cells read can be
        read.

        Raises:
            ConfigError: one of them cannot.
        """
        check_writable("study.dir", self.folder)
        for data in {str(cell.config.data): cell.config for cell in self.grid.cells}.values():
            check_paths(data)

    def file(self, kind: str, cell: Cell, ending: str = "") -> Path:
        """The path of a cell's file in the study's folder ``kind``."""
        return self.folder / kind / f"{cell.run_name}{ending}"

    def attempts(self, cell: Cell) -> Attempts:
        path = self.file("attempts", cell, ".json")
        return Attempts(**json.loads(path.read_text())) if path.is_file() else Attempts()

    def remember(self, cell: Cell, attempts: Attempts) -> None:
        """Record the tries of a cell."""
        path = self.file("attempts", cell, ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(attempts))

    def exhausted(self, cell: Cell) -> bool:
        """Whether a cell has failed as often as it is tried."""
        return self.attempts(cell).failures > self.grid.retries

    def finished(self, cell: Cell) -> bool:
        return is_finished(_summary(cell), cell.config.last_step)

    def status(self) -> list[CellStatus]:
        """The state of every cell, the pilot's first, then in the grid's order."""
        pilot = self.grid.pilot.cells if self.grid.pilot is not None else []
        return [self.status_of(cell) for cell in [*pilot, *self.grid.cells]]

    def status_of(self, cell: Cell) -> CellStatus:
        """The state of one cell."""
        attempts, summary = self.attempts(cell), _summary(cell)
        step, flops, rate, loss = *_progress(cell.folder), None
        if cell.unknown:
            none = NO_CROSSING if self.grid.crossings else NO_TAU
            state = NOT_YET.get(cell.unknown, none)
        elif self.finished(cell):
            state, loss = FINISHED, summary["final_eval_loss"]
            # of a resumed run the wall time may be of its last part alone
            seconds = max(summary.get(key) or 0.0 for key in ("wall_s", "train_wall_s"))
            rate = summary["total_flops"] / seconds if seconds else None
        elif self.owner(cell) is not None:
            state = RUNNING
        elif self.exhausted(cell):
            state = FAILED
        else:
            state = STARTED if cell.folder.is_dir() else WAITING
        return CellStatus(cell, state, attempts, step, flops, rate, loss)

    def owner(self, cell: Cell) -> Owner | None:
        """Who runs a cell: a worker of a grid, or a run that its worker has left alone or that was
        started without one. This only looks: it keeps nobody from taking the cell."""
        return owner_of(self.file("locks", cell)) or owner_of(cell.folder / LOCK_NAME)

    @contextmanager
    def lock(self, cell: Cell) -> Iterator[FolderLock | None]:
        """A context with the cell's lock, or None where another worker has it. The lock can be lent
        to the run, so that it lasts as long as either lives."""
        lock = FolderLock(self.file("locks", cell))
        try:
            lock.acquire()
        except FolderInUse:
            yield None
            return
        try:
            yield lock
        finally:
            lock.release()

    def collect(self) -> list[dict[str, Any]]:
        """The results of the finished cells, which are also written to ``results.json``."""
        rows = []
        for cell in self.grid.cells:
            if cell.unknown or not self.finished(cell):
                continue
            summary = _summary(cell)
            rows.append(
                {
                    "cell": cell.name,
                    "fingerprint": cell.fingerprint,
                    "size": cell.size,
                    "arm": cell.arm,
                    "seed": cell.seed,
                    "control_of": cell.control_of,
                    "params": params_of(cell),
                    "version": self.attempts(cell).version,
                    **{key: summary[key] for key in _RESULTS},
                }
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "results.json", {"cells": rows})
        return rows


def _summary(cell: Cell) -> dict[str, Any]:
    return read_summary(cell.folder)[0] or {}


def _progress(folder: Path) -> tuple[int, float, float | None]:
    """The steps and FLOPs that a run's metrics have, and the FLOPs per second of its last step."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return 0, 0.0, None
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    steps: list[tuple[int, float, float]] = []
    for line in lines:
        try:
            event = json.loads(line)
            if event["event"] == "train":
                steps.append((event["step"], event["flops"], event["step_time_s"]))
        except (ValueError, KeyError, TypeError):
            continue  # the first line may be cut, the last one half written
    if not steps:
        return 0, 0.0, None
    step, flops, seconds = steps[-1]
    before = steps[-2][1] if len(steps) > 1 else None
    rate = None if before is None or not seconds else (flops - before) / seconds
    return step, flops, rate
