"""How the processes of a grid's runs start, and how they are told to stop."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError
from megatron_progressive.runtime.launch import free_port
from megatron_progressive.runtime.signals import stop_signals
from megatron_progressive.runtime.tied import tied_command

_STOP = signal.SIGUSR1
"""The signal that asks a run to save and stop. ``srun`` passes it on; on SIGTERM it kills the ranks
at once."""


@dataclass(frozen=True)
class Launch:
    """How the processes of a run start."""

    nproc: int = 1
    """The number of local workers."""
    srun: str = ""
    """For a run inside a Slurm job: ``srun`` and its options, over all of the job's tasks."""

    def check(self) -> None:
        """Check that runs can be started in this way.

        Raises:
            ConfigError: there is no such program.
        """
        accepted = "accepted: srun and its options, inside a Slurm job"
        try:
            words = shlex.split(self.srun)
        except ValueError as error:
            raise ConfigError(f"--srun: got {self.srun!r}: {error}; {accepted}") from None
        if words and shutil.which(words[0]) is None:
            raise ConfigError(f"--srun: got {self.srun!r}, no program {words[0]} here; {accepted}")

    def environment(self) -> dict[str, str]:
        """The environment of a try. Under ``srun`` the ranks meet on this host, which is the job's
        first one, at a port that is free now; a port that another job has taken is not tried
        again."""
        return {**os.environ, **({"MASTER_PORT": str(free_port())} if self.srun else {})}

    def command(self, config: Path) -> list[str]:
        train = [sys.executable, "-m", "megatron_progressive", "train", str(config)]
        if self.srun:
            return tied_command([*shlex.split(self.srun), *train], _STOP)
        return [*train, "--nproc", str(self.nproc)]


class Signals:
    """Passes :func:`.signals.stop_signals` on to the running cells, which save and stop."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._running: set[Any] = set()

    @property
    def came(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """Stop as if a signal had come, because somebody else told a run to stop."""
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
        """A context in which the signals are taken."""
        previous = {number: signal.signal(number, self._pass_on) for number in stop_signals()}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
