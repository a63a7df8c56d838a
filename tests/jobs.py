"""Whole jobs of real processes that may be killed, without an interpreter's start for each.

One process imports everything once and then forks the ranks of each job.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

GRACE_S = 30.0
"""How long the others may take to leave by themselves after a rank failed. After a rank was
killed, which nobody in the job may notice, the launcher ends them, here at once."""


@dataclass(frozen=True)
class Job:
    """How a job ended: exit codes (negative: killed by that signal) and output by rank."""

    codes: list[int]
    output: list[str]
    hung: list[int]
    """Ranks that did not leave by themselves in time."""


def _rank(rank: int, world: int, port: int, log: Path, prepare: Any, arguments: list[str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    code = 1
    try:
        from megatron_progressive.cli import main

        if prepare is not None:
            module, name, values = prepare
            getattr(__import__(module, fromlist=[name]), name)(*values)
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int]) -> tuple[list[int], list[int]]:
    """Exit codes, and the ranks that had to be ended."""
    codes: dict[int, int] = {}
    hung: list[int] = []
    failed_at: float | None = None
    while len(codes) < len(pids):
        for rank in [r for r in range(len(pids)) if r not in codes]:
            pid, status = os.waitpid(pids[rank], os.WNOHANG)
            if pid:
                codes[rank] = os.waitstatus_to_exitcode(status)
                if codes[rank] and failed_at is None:
                    failed_at = time.monotonic() - (GRACE_S if codes[rank] < 0 else 0)
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S and not hung:
            hung = [r for r in range(len(pids)) if r not in codes]
            for rank in hung:
                os.kill(pids[rank], signal.SIGKILL)
        time.sleep(0.01)
    return [codes[rank] for rank in range(len(pids))], hung


def _serve(connection: Connection) -> None:
    import tests.warm  # noqa: F401

    while (message := connection.recv()) is not None:
        port, logs, prepare, arguments = message
        pids = []
        for rank, log in enumerate(logs):
            pid = os.fork()
            if pid == 0:
                _rank(rank, len(logs), port, log, prepare, arguments)
            pids.append(pid)
        connection.send(_wait(pids))


class Jobs:
    """Runs ``mprog`` jobs one after another."""

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()

    def run(self, world: int, folder: Path, arguments: list[str], prepare: Any = None) -> Job:
        """Run one job to its end.

        Args:
            folder: for the ranks' output.
            arguments: of ``mprog``.
            prepare: (module, function, arguments), called on each rank before it starts.
        """
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        logs = [folder / f"rank{rank}.log" for rank in range(world)]
        self._connection.send((store.port, logs, prepare, arguments))
        codes, hung = self._connection.recv()
        return Job(codes, [log.read_text() for log in logs], hung)

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()
