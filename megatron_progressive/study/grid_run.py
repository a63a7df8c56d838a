"""Run a grid's cells with local workers, say how far they are, and gather their results.

The study's folder holds ``cells/`` (run folders), ``configs/``, ``logs/``, ``attempts/`` (one JSON
file a cell: tries, last error, version of the code) and ``locks/``. A finished cell is one whose
run folder has a ``summary.json``; nothing else makes it so, and only deleting that folder makes it
run again. A cell is locked while it runs: several ``mprog grid run`` share a study.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_progressive import __version__
from megatron_progressive.config import to_yaml
from megatron_progressive.runtime.files import write_atomically, write_json
from megatron_progressive.runtime.launch import free_port
from megatron_progressive.study.grid import Cell, Grid, params_of

FINISHED, RUNNING, FAILED, STARTED, WAITING = "finished", "running", "failed", "started", "waiting"
STOPPED = 75
"""Exit code of a run, and of a grid, that a signal stopped."""
_STOP = signal.SIGUSR1
"""Asks a run to save and stop. ``srun`` passes it on; on SIGTERM it kills the ranks at once."""


@dataclass(frozen=True)
class Attempts:
    """What is known of a cell's tries."""

    failures: int = 0
    error: str = ""
    """Last line of the last failure."""
    version: str = ""
    """Of the code that finished it, or tried last."""


@dataclass(frozen=True)
class CellStatus:
    cell: Cell
    state: str
    attempts: Attempts
    step: int
    """Steps that its metrics have."""
    loss: float | None
    """Final validation loss, of a finished cell."""


def code_version() -> str:
    """The package's version, with the commit where it runs from a clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{__version__} ({found.stdout.strip()})" if found.returncode == 0 else __version__


@dataclass(frozen=True)
class Launch:
    """How the processes of a run start."""

    nproc: int = 1
    """Local workers."""
    srun: str = ""
    """Inside a Slurm job instead: ``srun`` and its options, over all of the job's tasks."""

    def environment(self) -> dict[str, str]:
        """For a try. Under ``srun`` the ranks meet on this host, the job's first, at a port that
        is free now: one that another job took is not tried again."""
        return {**os.environ, **({"MASTER_PORT": str(free_port())} if self.srun else {})}

    def command(self, config: Path) -> list[str]:
        train = [sys.executable, "-m", "megatron_progressive", "train", str(config)]
        if self.srun:
            return [*shlex.split(self.srun), *train]
        return [*train, "--nproc", str(self.nproc)]


class Study:
    """A grid and its folder."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.folder = grid, grid.folder

    def _file(self, kind: str, cell: Cell, ending: str) -> Path:
        return self.folder / kind / f"{cell.config.run.name}{ending}"

    def attempts(self, cell: Cell) -> Attempts:
        path = self._file("attempts", cell, ".json")
        return Attempts(**json.loads(path.read_text())) if path.is_file() else Attempts()

    def finished(self, cell: Cell) -> bool:
        return (cell.folder / "summary.json").is_file()

    def status(self) -> list[CellStatus]:
        """The state of every cell, in the grid's order."""
        return [self._status(cell) for cell in self.grid.cells]

    def _status(self, cell: Cell) -> CellStatus:
        attempts, loss = self.attempts(cell), None
        if self.finished(cell):
            state = FINISHED
            loss = json.loads((cell.folder / "summary.json").read_text())["final_eval_loss"]
        elif self._locked(cell):
            state = RUNNING
        elif attempts.failures > self.grid.retries:
            state = FAILED
        else:
            state = STARTED if cell.folder.is_dir() else WAITING
        return CellStatus(cell, state, attempts, _last_step(cell.folder), loss)

    def _locked(self, cell: Cell) -> bool:
        path = self._file("locks", cell, "")
        if not path.is_file():
            return False
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @contextmanager
    def _lock(self, cell: Cell) -> Iterator[int | None]:
        """The lock's file, or None where another worker has the cell. The run inherits it, so that
        the lock lasts as long as either lives."""
        path = self._file("locks", cell, "")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield file.fileno()

    def run_cell(
        self,
        cell: Cell,
        launch: Launch,
        started: Callable[[Any], None] = lambda process: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> int | None:
        """Run or continue a cell until it is finished, has failed too often or was stopped.

        Args:
            launch: how a run's processes start.
            started: gets the process of each try, to pass signals on to.
            stopping: whether such a signal has come: what ends then has not failed.

        Returns: the last exit code; None where another worker has the cell or it was finished.
        """
        with self._lock(cell) as lock:
            if lock is None or self.finished(cell):
                return None
            path = self._file("configs", cell, ".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, to_yaml(cell.config))
            log = self._file("logs", cell, ".log")
            log.parent.mkdir(parents=True, exist_ok=True)
            command = launch.command(path)
            while self.attempts(cell).failures <= self.grid.retries:
                with open(log, "ab") as out:
                    process = subprocess.Popen(
                        command, stdout=out, stderr=out, env=launch.environment(),
                        start_new_session=True, pass_fds=(lock,),
                    )  # fmt: skip
                    started(process)
                    code = process.wait()
                if code and stopping():  # perhaps before it could take the signal
                    return STOPPED
                if code in (0, STOPPED):
                    self._remember(cell, Attempts(self.attempts(cell).failures, "", code_version()))
                    return code
                failures = self.attempts(cell).failures + 1
                self._remember(cell, Attempts(failures, _last_line(log), code_version()))
                if code == 2:  # a configuration does not become good by trying again
                    self._remember(
                        cell, Attempts(self.grid.retries + 1, _last_line(log), code_version())
                    )
            return code

    def _remember(self, cell: Cell, attempts: Attempts) -> None:
        path = self._file("attempts", cell, ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(attempts))

    def run(self, workers: int, launch: Launch, say: Callable[[str], None]) -> int:
        """Run what is not finished, the cheapest cells first, ``workers`` at a time.

        Signals (SIGTERM, SIGINT, SIGUSR1) go to the running cells, which save and stop.

        Returns: 0 when every cell is finished, 75 where a signal stopped the grid, else 1.
        """
        from megatron_progressive import data

        waiting = sorted(
            (cell for cell in self.grid.cells if not self.finished(cell)), key=lambda c: c.flops
        )
        for config in {str(c.config.data): c.config for c in waiting}.values():
            data.check(config)
            data.prepare(config)  # once, before workers would all begin to
        guard, stop = threading.Lock(), threading.Event()
        running: set[Any] = set()
        codes: list[int] = []

        def pass_on(number: int, frame: Any) -> None:
            stop.set()
            for process in list(running):
                if process.poll() is None:
                    process.send_signal(_STOP)

        def started(process: Any) -> None:
            running.add(process)
            if stop.is_set():  # the signal came while it began
                process.send_signal(_STOP)

        def work() -> None:
            while not stop.is_set():
                with guard:
                    if not waiting:
                        return
                    cell = waiting.pop(0)
                say(f"{cell.name}: starts ({len(waiting)} after it)")
                code = self.run_cell(cell, launch, started, stop.is_set)
                if code == STOPPED:  # the job is being preempted: its ranks alone were told
                    stop.set()
                if code is not None:
                    codes.append(code)
                    loss = self._status(cell).loss
                    error = self.attempts(cell).error
                    say(f"{cell.name}: {error or f'validation loss {loss}'}")

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        previous = {number: signal.signal(number, pass_on) for number in numbers}
        threads = [threading.Thread(target=work) for _ in range(workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # so that signals are taken
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if stop.is_set():
            return STOPPED
        return 0 if all(self.finished(cell) for cell in self.grid.cells) else 1

    def collect(self) -> list[dict[str, Any]]:
        """Results of the finished cells; also written to ``results.json``."""
        rows = []
        for cell in self.grid.cells:
            if not self.finished(cell):
                continue
            summary = json.loads((cell.folder / "summary.json").read_text())
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
                    **{k: summary[k] for k in ("final_eval_loss", "total_flops", "total_tokens",
                                               "train_wall_s", "steps", "num_layers")},
                }
            )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "results.json", {"cells": rows})
        return rows


def _last_step(folder: Path) -> int:
    """Steps in a run's metrics, from the end of the file."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line).get("step", 0))
        except (ValueError, AttributeError):
            continue
    return 0


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
