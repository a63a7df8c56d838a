"""Run a grid's pilot and cells, with local workers or the tasks of a Slurm job.

A cell is locked while it runs: several ``mprog grid run`` share a study. The pilot's two runs are
cells in that, too.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError, to_yaml
from megatron_progressive.runtime.files import write_atomically
from megatron_progressive.runtime.launch import free_port
from megatron_progressive.study.cells import Cell
from megatron_progressive.study.grid_pilot import WAITS
from megatron_progressive.study.grid_state import RUNNING, Attempts, Study, code_version

FAILED_CODE = 1
STOPPED = 75
"""Exit code of a run, and of a grid, that a signal stopped."""
_STOP = signal.SIGUSR1
"""Asks a run to save and stop. ``srun`` passes it on; on SIGTERM it kills the ranks at once."""
NO_TAU_CODE = 3
"""Exit code of a grid whose pilot gives no τ to some cell; all others are finished."""

_POLL_SECONDS = 2.0  # until a pilot that another job runs is looked at again

Say = Callable[[str], None]


@dataclass(frozen=True)
class Launch:
    """How the processes of a run start."""

    nproc: int = 1
    """Local workers."""
    srun: str = ""
    """Inside a Slurm job instead: ``srun`` and its options, over all of the job's tasks."""

    def __post_init__(self) -> None:
        try:
            shlex.split(self.srun)
        except ValueError as error:
            raise ConfigError(
                f"--srun: got {self.srun!r}: {error}; accepted: srun and its options"
            ) from None

    def environment(self) -> dict[str, str]:
        """For a try. Under ``srun`` the ranks meet on this host, the job's first, at a port that
        is free now: one that another job took is not tried again."""
        return {**os.environ, **({"MASTER_PORT": str(free_port())} if self.srun else {})}

    def command(self, config: Path) -> list[str]:
        train = [sys.executable, "-m", "megatron_progressive", "train", str(config)]
        if self.srun:
            return [*shlex.split(self.srun), *train]
        return [*train, "--nproc", str(self.nproc)]


class Signals:
    """SIGTERM, SIGINT and SIGUSR1 go to the running cells, which save and stop."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._running: set[Any] = set()

    @property
    def came(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """As if a signal had come: a run was told to stop by someone else."""
        self._stop.set()

    def started(self, process: Any) -> None:
        """Pass signals on to ``process``, too."""
        self._running.add(process)
        if self.came:  # the signal came while it began
            process.send_signal(_STOP)

    def _pass_on(self, number: int, frame: Any) -> None:
        self._stop.set()
        for process in list(self._running):
            if process.poll() is None:
                process.send_signal(_STOP)

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Take the signals meanwhile."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        previous = {number: signal.signal(number, self._pass_on) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def run_cell(
    study: Study, cell: Cell, launch: Launch, signals: Signals | None = None
) -> int | None:
    """Run or continue a cell until it is finished, has failed too often or was stopped.

    Args:
        launch: how a run's processes start.
        signals: get the process of each try; what ends after one came has not failed.

    Returns: the last exit code; None where another worker has the cell, or it is finished or has
        failed as often as it is tried.
    """
    signals = Signals() if signals is None else signals
    with study.lock(cell) as lock:
        if lock is None or study.finished(cell) or study.exhausted(cell):
            return None
        path, log = study.file("configs", cell, ".yaml"), study.file("logs", cell, ".log")
        for file in (path, log):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_yaml(cell.config))
        while True:
            with open(log, "ab") as out:
                process = subprocess.Popen(
                    launch.command(path), stdout=out, stderr=out, env=launch.environment(),
                    start_new_session=True, pass_fds=(lock,),
                )  # fmt: skip
                signals.started(process)
                code = process.wait()
            if code and signals.came:  # perhaps before it could take the signal
                return STOPPED
            failures = study.attempts(cell).failures
            if code in (0, STOPPED):
                study.remember(cell, Attempts(failures, "", code_version()))
                return code
            # a configuration does not become good by trying again
            failures = study.grid.retries + 1 if code == 2 else failures + 1
            study.remember(cell, Attempts(failures, _last_line(log), code_version()))
            if failures > study.grid.retries:
                return code


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def run_grid(
    study: Study, workers: int, launch: Launch, say: Say, chosen: Sequence[str] = ()
) -> int:
    """Run what is not finished: the pilot first where one is asked for and needed, then the
    cells, the cheapest first, ``workers`` at a time. Signals stop it; see :class:`Signals`.

    Args:
        chosen: names or indices of the cells to run (default: all of them).

    Returns: 0 when these cells are finished, 75 where a signal stopped it, 3 where the pilot gives
        some of them no τ and the others are finished, else 1.

    Raises:
        ConfigError: a cell that is not there, or data that cannot be read.
    """
    cells = study.grid.chosen(list(chosen)) if chosen else study.grid.cells
    with Signals().caught() as signals:
        if study.grid.pilot is not None and (
            not chosen or any(cell.unknown == WAITS for cell in cells)
        ):
            _run_pilot(study, workers, launch, say, signals)
            study = Study(study.grid.reloaded())  # whose cells now know their τ
            cells = study.grid.chosen([cell.name for cell in cells])
        if not signals.came:
            _run_all(study, [c for c in cells if not c.unknown], workers, launch, say, signals)
        if signals.came:
            return STOPPED
    for cell in cells:
        if cell.unknown:
            say(f"{cell.name}: not run: {cell.unknown}")
    if any(c.unknown == WAITS or not (c.unknown or study.finished(c)) for c in cells):
        return FAILED_CODE
    return NO_TAU_CODE if any(cell.unknown for cell in cells) else 0


def run_pilot(study: Study, workers: int, launch: Launch, say: Say) -> int:
    """Run the grid's pilot alone.

    Returns: 0 where it gives τ to every cell that asks for it, 3 where it does not, 75 where a
        signal stopped it, 1 where it failed.

    Raises:
        ConfigError: the grid has none.
    """
    pilot = study.grid.pilot
    if pilot is None:
        raise ConfigError(
            f"pilot: got none in {study.grid.file}; accepted: a mapping, or tau: [pilot]"
        )
    with Signals().caught() as signals:
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


def _run_pilot(study: Study, workers: int, launch: Launch, say: Say, signals: Signals) -> int:
    """Run what is not finished of the pilot, wait for what another job runs of it, and measure."""
    pilot = study.grid.pilot
    assert pilot is not None
    waiting = False
    while pilot.mixing() is None:
        free = [cell for cell in pilot.cells if study.status_of(cell).state != RUNNING]
        _run_all(study, free, workers, launch, say, signals)
        if signals.came:
            return STOPPED
        for cell in pilot.cells:
            if study.exhausted(cell) and not study.finished(cell):
                say(f"the pilot failed: {cell.name}: {study.attempts(cell).error}")
                return FAILED_CODE
        with study.lock(Cell("pilot", "", "", 0, pilot.config)) as lock:
            if lock is not None and all(study.finished(cell) for cell in pilot.cells):
                if pilot.mixing() is None:
                    pilot.measure()
                break
        if not waiting:
            say("the pilot runs elsewhere: waiting for it")
            waiting = True
        time.sleep(_POLL_SECONDS)
    say(f"pilot: {pilot.finding()}")
    return 0


def _run_all(
    study: Study, cells: Sequence[Cell], workers: int, launch: Launch, say: Say, signals: Signals
) -> None:
    from megatron_progressive import data

    waiting = sorted((cell for cell in cells if not study.finished(cell)), key=lambda c: c.flops)
    for cell in [cell for cell in waiting if study.exhausted(cell)]:
        waiting.remove(cell)
        say(
            f"{cell.name}: not run: failed {study.attempts(cell).failures} times: "
            f"{study.attempts(cell).error} (delete {study.file('attempts', cell, '.json')} to try "
            f"again)"
        )
    for config in {str(c.config.data): c.config for c in waiting}.values():
        data.check(config)
        data.prepare(config)  # once, before workers would all begin to
    guard = threading.Lock()

    def work() -> None:
        while not signals.came:
            with guard:
                if not waiting:
                    return
                cell = waiting.pop(0)
            say(f"{cell.name}: starts ({len(waiting)} after it)")
            code = run_cell(study, cell, launch, signals)
            if code is None:
                say(f"{cell.name}: another worker has it")
            elif code == STOPPED:
                signals.stop()  # Slurm tells the ranks of a preempted job, and not this process
                say(f"{cell.name}: stopped after saving")
            else:
                found = study.status_of(cell)
                say(f"{cell.name}: {found.attempts.error or f'validation loss {found.loss}'}")

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(waiting)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)  # so that signals are taken
