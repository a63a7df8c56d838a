"""Running a grid's pilot and cells, with local workers or with the tasks of a Slurm job.

A cell is locked while it runs: several ``mprog grid run`` share a study. The two runs of the pilot
are cells in this respect, too.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_progressive.config import ConfigError
from megatron_progressive.grid.cell_runs import one_a_run
from megatron_progressive.grid.cells import Cell
from megatron_progressive.grid.crossing import waited_for
from megatron_progressive.grid.launch import Launch, Signals
from megatron_progressive.grid.pilot import WAITS
from megatron_progressive.grid.run_cell import (
    PATIENCE_SECONDS,
    POLL_SECONDS,
    STOPPED,
    NotStarted,
    run_cell,
)
from megatron_progressive.grid.settling import settled
from megatron_progressive.grid.state import FAILED, NOT_YET, RUNNING, Study
from megatron_progressive.runtime.progress import Say

FAILED_CODE = 1
NO_TAU_CODE = 3
"""The exit code of a grid whose pilot gives no τ to some cell, or whose depths alone do not cross,
where all other cells are finished."""


def run_grid(
    study: Study, workers: int, launch: Launch, say: Say, chosen: Sequence[str] = ()
) -> int:
    """Run what is not finished: the pilot, or a crossing's depths alone, first where these are
    asked for and needed, then the cells, the cheapest first, ``workers`` at a time. Signals stop
    it; see :class:`Signals`.

    Args:
        chosen: names or indices of the cells to run (default: all of them).

    Returns: 0 when these cells are finished, 75 where a signal stopped it, 3 where the pilot gives
        some of them no τ, or there is no crossing, and the others are finished, else 1; the last
        line says why.

    Raises:
        ConfigError: there is no such cell, data cannot be read, or no run can be started in this
            place.
    """
    launch.check()
    cells = study.grid.chosen(list(chosen)) if chosen else study.grid.cells
    measured = chosen or study.grid.pilot is None or study.grid.pilot.mixing() is not None
    if measured and all(not cell.unknown and study.finished(cell) for cell in cells):
        say(f"{study.grid.name}: nothing to do, {_count(cells)} finished")
        return 0
    with Signals().caught() as signals:
        pilot = study.grid.pilot if not chosen or any(c.unknown == WAITS for c in cells) else None
        before = pilot.cells if pilot is not None else waited_for(study.grid.crossings, cells)
        study = _settled(study, [*cells, *before], say)
        cells = study.grid.chosen([cell.name for cell in cells])
        if pilot is not None:
            code = _run_pilot(study, workers, launch, say, signals)
            study = Study(study.grid.reloaded())  # whose cells now know their τ
            cells = study.grid.chosen([cell.name for cell in cells])
            if code == FAILED_CODE:
                say(f"{study.grid.name}: cells whose τ the pilot gives are not run")
        if waited_for(study.grid.crossings, cells):
            study = _run_alone(study, cells, workers, launch, say, signals)
            cells = study.grid.chosen([cell.name for cell in cells])
        if not signals.came:
            _run_all(study, [c for c in cells if not c.unknown], workers, launch, say, signals)
        if signals.came:
            say(f"{study.grid.name}: stopped by a signal; the same command goes on from there")
            return STOPPED
    for cell in cells:
        if cell.unknown:
            say(f"{cell.name}: not run: {cell.unknown}")
    left = [c for c in one_a_run(cells) if not c.unknown and not study.finished(c)]
    if left:
        say(f"{study.grid.name}: {_unfinished(study, left, cells)}")
    if left or any(cell.unknown in NOT_YET for cell in cells):
        return FAILED_CODE
    return NO_TAU_CODE if any(cell.unknown for cell in cells) else 0


def _count(cells: Sequence[Cell]) -> str:
    return f"all {len(cells)} cells are" if len(cells) > 1 else f"{cells[0].name} is"


def _unfinished(study: Study, left: Sequence[Cell], cells: Sequence[Cell]) -> str:
    """How many of ``cells`` are not finished, and why."""
    states = [study.status_of(cell).state for cell in left]
    running, failed = states.count(RUNNING), states.count(FAILED)
    reasons = [
        f"{count} {what}"
        for count, what in (
            (running, "run by other workers"), (failed, "failed"),
            (len(left) - running - failed, "not run here"),
        )
        if count
    ]  # fmt: skip
    return f"{len(left)} of {len(cells)} cells not finished ({', '.join(reasons)})"


def run_pilot(study: Study, workers: int, launch: Launch, say: Say) -> int:
    """Run the grid's pilot alone.

    Returns: 0 where it gives τ to every cell that asks for it, 3 where it does not, 75 where a
        signal stopped it, 1 where it failed.

    Raises:
        ConfigError: the grid has no pilot.
    """
    launch.check()
    pilot = study.grid.pilot
    if pilot is None:
        raise ConfigError(
            f"pilot: got none in {study.grid.file}; accepted: a mapping, or tau: [pilot]"
        )
    with Signals().caught() as signals:
        study = _settled(study, pilot.cells, say)
        assert study.grid.pilot is not None
        pilot = study.grid.pilot
        code = _run_pilot(study, workers, launch, say, signals)
    if code:
        return code
    found = pilot.mixing()
    cells = study.grid.reloaded().cells
    for cell in cells:
        if cell.unknown:
            say(f"{cell.name}: {cell.unknown}")
    known = found is not None and found.mixed and not any(cell.unknown for cell in cells)
    return 0 if known else NO_TAU_CODE


def _settled(study: Study, cells: Sequence[Cell], say: Say) -> Study:
    """The study once the data of ``cells`` is settled and prepared. This is done once, before all
    workers would begin to do it. Cells that will never get a τ are left out."""
    cells = [cell for cell in cells if not cell.unknown or cell.unknown in NOT_YET]
    return Study(study.grid.reloaded()) if settled(study, cells, say) else study


def _run_pilot(study: Study, workers: int, launch: Launch, say: Say, signals: Signals) -> int:
    """Run what is not finished of the pilot, wait for what another job runs of it, and measure."""
    pilot = study.grid.pilot
    assert pilot is not None
    waiting = False
    while pilot.mixing() is None:
        free = [cell for cell in pilot.cells if study.status_of(cell).state != RUNNING]
        started = _run_all(study, free, workers, launch, say, signals)
        if signals.came:
            return STOPPED
        for cell in pilot.cells:
            if study.exhausted(cell) and not study.finished(cell):
                say(f"the pilot failed: {cell.name}: {study.attempts(cell).error}")
                return FAILED_CODE
        if not started:
            say("the pilot was not run")
            return FAILED_CODE
        with study.lock(Cell("pilot", "", "", 0, pilot.config)) as lock:
            if lock is not None and all(study.finished(cell) for cell in pilot.cells):
                if pilot.mixing() is None:
                    pilot.measure()
                break
        if not waiting:
            say("the pilot runs elsewhere: waiting for it")
            waiting = True
        time.sleep(POLL_SECONDS)
    say(f"pilot: {pilot.finding()}")
    return 0


def _run_alone(
    study: Study, cells: Sequence[Cell], workers: int, launch: Launch, say: Say, signals: Signals
) -> Study:
    """Run the depths alone for whose crossing any of ``cells`` waits, and wait for those that
    another job runs.

    Returns: The study, whose cells know where the depths cross as far as that is known now.
    """
    waiting = False
    while True:
        alone = waited_for(study.grid.crossings, cells)
        free = [cell for cell in alone if study.status_of(cell).state != RUNNING]
        started = _run_all(study, free, workers, launch, say, signals)
        left = [cell for cell in alone if not study.finished(cell)]
        failed = [cell for cell in left if study.exhausted(cell)]
        if failed:
            say(
                f"{study.grid.name}: cells around the crossing are not run: {failed[0].name} failed"
            )
        if failed or not left or not started or signals.came:
            break
        if not waiting:
            say(f"{study.grid.name}: depths alone run elsewhere: waiting for them")
            waiting = True
        time.sleep(POLL_SECONDS)
    study = Study(study.grid.reloaded())
    for one in study.grid.crossings:
        if (found := one.found()) is not None:
            say(f"crossing of {one.size} ({one.schedule}): {one.finding(found)}")
    return study


def _run_all(
    study: Study, cells: Sequence[Cell], workers: int, launch: Launch, say: Say, signals: Signals
) -> bool:
    """Run what is not finished of ``cells``, once for each run; False where some could not be
    started.

    Raises:
        ConfigError: data cannot be read, or no run can be started in this place.
    """
    waiting = [cell for cell in one_a_run(cells) if not study.finished(cell)]
    waiting.sort(key=lambda cell: cell.flops)
    for cell in [cell for cell in waiting if study.exhausted(cell)]:
        waiting.remove(cell)
        say(
            f"{cell.name}: not run: failed {study.attempts(cell).failures} times: "
            f"{study.attempts(cell).error} (delete {study.file('attempts', cell, '.json')} to try "
            f"again)"
        )
    found = _Round(study, waiting, launch, say, signals)
    found.run(workers)
    if again := _left_by_others(study, found.taken, say, signals):
        found = _Round(study, again, launch, say, signals, not_started=found.not_started)
        found.run(workers)
    for error in found.not_started:
        if error.everywhere:
            raise ConfigError(
                f"no cell can be started here: {error}; accepted: where this trains: "
                f"{' '.join(launch.command(Path('CONFIG')))}"
            )
    return not found.not_started


@dataclass
class _Round:
    """The cells that workers, which are threads, take one after another."""

    study: Study
    waiting: list[Cell]
    launch: Launch
    say: Say
    signals: Signals
    taken: list[Cell] = field(default_factory=list)
    """The cells that other workers have."""
    not_started: list[NotStarted] = field(default_factory=list)
    broken: list[BaseException] = field(default_factory=list)
    """The errors that ended a thread."""

    def run(self, workers: int) -> None:
        """Run until no cell waits, or until none can be run any more."""
        guard = threading.Lock()
        count = min(workers, len(self.waiting))
        threads = [threading.Thread(target=self._work, args=(guard,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # so that signals are taken
        if self.broken:
            raise self.broken[0]

    def _work(self, guard: threading.Lock) -> None:
        try:
            while not (
                self.signals.came or self.broken or any(e.everywhere for e in self.not_started)
            ):
                with guard:
                    if not self.waiting:
                        return
                    cell = self.waiting.pop(0)
                    self.say(f"{cell.name}: starts ({len(self.waiting)} after it)")
                self._one(cell)
        except BaseException as error:  # not lost with its thread
            self.broken.append(error)

    def _one(self, cell: Cell) -> None:
        try:
            code = run_cell(self.study, cell, self.launch, self.signals)
        except NotStarted as error:
            self.say(f"{cell.name}: not started, which is no failure of its own: {error}")
            self.not_started.append(error)
            return
        found = self.study.status_of(cell)
        if code == STOPPED:
            self.signals.stop()  # Slurm tells the ranks of a preempted job, and not this process
            self.say(f"{cell.name}: stopped after saving")
        elif code is None and found.loss is None and not self.study.exhausted(cell):
            owner = self.study.owner(cell)
            self.say(f"{cell.name}: another worker has it: {owner or 'it has ended by now'}")
            self.taken.append(cell)
        elif found.loss is not None:
            self.say(f"{cell.name}: validation loss {found.loss}")
        else:
            self.say(f"{cell.name}: {found.attempts.error}")


def _left_by_others(study: Study, taken: Sequence[Cell], say: Say, signals: Signals) -> list[Cell]:
    """The cells of others that nobody has any more. A cell of another host may still look taken
    where its node has failed; it is waited for until that would show."""

    def far() -> list[Cell]:
        owners = [(cell, study.owner(cell)) for cell in taken]
        here = socket.gethostname()
        return [cell for cell, owner in owners if owner is not None and owner.host != here]

    deadline = time.monotonic() + PATIENCE_SECONDS
    if others := far():
        say(
            f"{len(others)} cells are run on other hosts: waiting {PATIENCE_SECONDS:.0f} s at "
            f"most, in case those have failed"
        )
    while far() and time.monotonic() < deadline and not signals.came:
        time.sleep(POLL_SECONDS)
    return [cell for cell in taken if study.owner(cell) is None and not study.finished(cell)]
