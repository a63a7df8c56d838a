"""Running one cell of a grid: tries, its lock, and whose failure a failure was."""

from __future__ import annotations

import time

from megatron_progressive.grid.cells import Cell
from megatron_progressive.grid.failures import NO_PROGRAM_CODE, judge
from megatron_progressive.grid.launch import Launch, Signals
from megatron_progressive.grid.settling import cell_file
from megatron_progressive.grid.state import Attempts, Study, code_version
from megatron_progressive.runs.files import METRICS_FILE
from megatron_progressive.runtime.files import write_atomically
from megatron_progressive.runtime.folder_lock import (
    HEARTBEAT_SECONDS,
    LOCK_NAME,
    STALE_SECONDS,
    FolderLock,
    owner_of,
)
from megatron_progressive.runtime.tied import start_tied

STOPPED = 75
"""The exit code of a run, and of a grid, that a signal stopped."""
POLL_SECONDS = 2.0
"""The seconds until what another job runs is looked at again."""
PATIENCE_SECONDS = STALE_SECONDS + 2 * HEARTBEAT_SECONDS
"""After so many seconds an owner on another host that has died counts as dead."""

_LOG_TAIL = 1 << 18  # bytes of a try's log that say how it ended


class NotStarted(Exception):
    """A cell could not be started here, which is no failure of its own."""

    def __init__(self, line: str, everywhere: bool) -> None:
        """Say why the cell was not started. ``everywhere`` tells that no other cell can be started
        either."""
        super().__init__(line)
        self.everywhere = everywhere


def run_cell(
    study: Study, cell: Cell, launch: Launch, signals: Signals | None = None
) -> int | None:
    """Run or continue a cell until it is finished, has failed too often or was stopped.

    Args:
        launch: how a run's processes start.
        signals: get the process of each try; a run that ends after a signal came has not failed.

    Returns: the last exit code; None where another worker has the cell, or it is finished or has
        failed as often as it is tried.

    Raises:
        NotStarted: something else than the cell is to blame (:mod:`.failures`).
    """
    signals = Signals() if signals is None else signals
    with study.lock(cell) as lock:
        if lock is None or study.finished(cell) or study.exhausted(cell):
            return None
        for file in (study.file("configs", cell, ".yaml"), study.file("logs", cell, ".log")):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(study.file("configs", cell, ".yaml"), cell_file(cell))
        tries, elsewhere = 0, 0
        # first a run that a worker of before has left alone, then what may be left of the last try
        while _is_free(cell, signals, PATIENCE_SECONDS if tries else 0):
            tries += 1
            code, text, begun = _try(study, cell, launch, signals, lock)
            if code and signals.came:  # perhaps before it could take the signal
                return STOPPED
            failures = study.attempts(cell).failures
            if code == STOPPED or (code == 0 and study.finished(cell)):
                study.remember(cell, Attempts(failures, "", code_version()))
                return code
            failure = judge(code, text, begun)
            if failure.in_use:
                continue
            if failure.own:
                # a configuration does not become good by trying again
                failures = study.grid.retries + 1 if failure.final else failures + 1
            study.remember(cell, Attempts(failures, failure.line, code_version()))
            if failures > study.grid.retries:
                return code
            elsewhere += not failure.own
            if not failure.own and (failure.final or elsewhere > study.grid.retries):
                raise NotStarted(failure.line, failure.everywhere)
    return None


def _is_free(cell: Cell, signals: Signals, seconds: float) -> bool:
    """Whether no job has the cell's run folder, or no job has it any more after at most
    ``seconds``."""
    deadline = time.monotonic() + seconds
    while owner_of(cell.folder / LOCK_NAME) is not None:
        if time.monotonic() >= deadline or signals.came:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _try(
    study: Study, cell: Cell, launch: Launch, signals: Signals, lock: FolderLock
) -> tuple[int, str, bool]:
    """One try of a cell; returns the exit code, the end of what it printed, and whether its run
    began."""
    log, before = study.file("logs", cell, ".log"), _beginning(cell)
    with open(log, "ab") as out:
        start = out.tell()
        try:
            process = start_tied(
                launch.command(study.file("configs", cell, ".yaml")), launch.environment(),
                stdout=out, stderr=out,
            )  # fmt: skip
        except OSError as error:
            return NO_PROGRAM_CODE, str(error), False
        lock.lend(process.pid)
        signals.started(process)
        code = process.wait()
    with open(log, "rb") as printed:
        printed.seek(max(start, log.stat().st_size - _LOG_TAIL))
        text = printed.read().decode(errors="replace")
    return code, text, _beginning(cell) != before


def _beginning(cell: Cell) -> tuple[int, ...] | None:
    """A value that differs for each beginning of a cell's run, which writes its metrics anew."""
    try:
        found = (cell.folder / METRICS_FILE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns
