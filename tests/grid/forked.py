"""``mprog grid run`` whose runs are forked: real training, without an interpreter's start for each.

For :class:`tests.jobs.Jobs`, whose process has imported everything: :func:`prepare` in the grid's
process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any


class ForkedRun:
    """What ``subprocess.Popen`` is for a run, in a fork of this process."""

    def __init__(self, command: list[str], stdout: Any, **options: Any) -> None:
        assert options["start_new_session"]
        words = command[command.index("megatron_progressive") + 1 :]
        self._code: int | None = None
        self._guard = threading.Lock()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                for descriptor in (1, 2):
                    os.dup2(stdout.fileno(), descriptor)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                    signal.signal(number, signal.SIG_DFL)
                for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                    os.environ.pop(name, None)  # a job of its own
                from megatron_progressive.cli import main

                code = main(words)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        with self._guard:
            if self._code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._code = os.waitstatus_to_exitcode(status)
            return self._code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def prepare(grid: str, steps: int | None, number: int) -> None:
    """Fork this grid's runs; send this process a signal once its cells have done ``steps`` more
    training steps (None: never)."""
    from megatron_progressive.grid.grid import load_grid
    from megatron_progressive.grid.state import Study
    from megatron_progressive.runtime import tied

    class Forking:
        """The module ``subprocess``, but for one name."""

        Popen = ForkedRun

        def __getattr__(self, name: str) -> Any:
            return getattr(subprocess, name)

    tied.subprocess = Forking()  # type: ignore[attr-defined, assignment]
    if steps is None:
        return
    study = Study(load_grid(Path(grid)))

    def done() -> int:
        return sum(one.step for one in study.status())

    goal = done() + steps

    def watch() -> None:
        while done() < goal:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
