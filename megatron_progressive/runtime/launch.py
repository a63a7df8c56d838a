"""The local workers of ``mprog train --nproc N``.

Torchrun's agent does not serve here: the exit codes 2 and 75 must reach the caller, and a signal
must reach each worker once and leave it the time to save. Workers end when this process is gone
(:mod:`.tied`).
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from megatron_progressive.runtime.signals import outlives_its_reader, stop_signals
from megatron_progressive.runtime.tied import start_tied

GRACE_SECONDS = 30.0
"""How many seconds the other workers have to end by themselves once one has failed."""

_PORTS = range(20000, 32000)
"""The ports below those that the kernel gives to outgoing connections."""


def free_port() -> int:
    """A random TCP port of this host on which nothing listens now."""
    while True:
        port = random.SystemRandom().choice(_PORTS)  # not the run's own random numbers
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


def run_workers(command: Sequence[str], nproc: int) -> int:
    """Run ``command`` in ``nproc`` processes of one job; returns the job's exit code.

    The ranks meet in a store that this process holds, so that no port is picked twice. The exit
    code is that of the first worker that failed, or 128 plus the signal's number where a signal
    came before the workers could save. The signals of :func:`.signals.stop_signals` are passed on
    as SIGTERM, which silently ends a worker that cannot save yet.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 joins our store, starts none
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    workers: list[subprocess.Popen[bytes]] = []
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        for rank in range(nproc):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(start_tied(command, own))
            if came:  # while it began
                workers[-1].send_signal(signal.SIGTERM)
        return _wait(workers, came)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(workers: list[subprocess.Popen[bytes]], came: list[int]) -> int:
    failed_at: float | None = None
    first_failure: tuple[int, int] | None = None
    while True:
        codes = [worker.poll() for worker in workers]
        for rank, code in enumerate(codes):
            if code and first_failure is None:
                first_failure, failed_at = (rank, code), time.monotonic()
        if all(code is not None for code in codes):
            break
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            break  # the others wait for a rank that is gone; the caller kills them
        time.sleep(0.05)
    if first_failure is None:
        return 0
    rank, code = first_failure
    if code == -signal.SIGTERM and came:
        name = signal.Signals(came[0]).name
        line = (
            "interrupted" if came[0] == signal.SIGINT else f"ended by {name} before it could save"
        )
        _say(f"mprog: {line}")
        return 128 + came[0]
    if code < 0:  # it could not say so itself
        _say(f"rank {rank}: killed by {signal.Signals(-code).name}")
        return 1
    return code


def _say(line: str) -> None:
    with outlives_its_reader():
        print(line, file=sys.stderr, flush=True)
