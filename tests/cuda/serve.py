"""A pool of ranks on the stand-in CUDA device, in processes of their own (see ``conftest.py``)."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing import Pipe, current_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import standin
from tests.pool import Pool

ROOT = Path(__file__).resolve().parents[2]


def variables(mode: str) -> dict[str, str]:
    """The environment of a process on the device; skips where there is none."""
    if reason := standin.available():
        pytest.skip(reason)
    environment = standin.environment(mode, devices=4, timeout_s=60)
    # torch asks NVML, and not the runtime, whether there is a device: it may fork afterwards
    return {**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class PoolOnDevice:
    """As :class:`tests.pool.Pool`, with NCCL on the stand-in; started at the first call."""

    def __init__(self, size: int, variables: dict[str, str]) -> None:
        self._size, self._variables = size, variables
        self._server: tuple[subprocess.Popen[bytes], Connection] | None = None

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(*arguments)`` on ranks 0..world-1; returns their results.

        Raises:
            AssertionError: with the traceback of the first rank that failed.
        """
        if self._server is None:
            ours, theirs = Pipe()
            descriptor = theirs.fileno()
            path = f"{ROOT}:{self._variables.get('PYTHONPATH', '')}"
            server = subprocess.Popen(
                [sys.executable, "-m", "tests.cuda.serve", str(descriptor), str(self._size)],
                env={**self._variables, "PYTHONPATH": path},
                pass_fds=[descriptor],
                cwd=ROOT,
            )
            theirs.close()
            ours.send_bytes(bytes(current_process().authkey))
            self._server = server, ours
        connection = self._server[1]
        connection.send((world, function.__module__, function.__name__, arguments))
        ok, result = connection.recv()
        assert ok, result
        return result  # type: ignore[no-any-return]

    def close(self) -> None:
        if self._server is not None:
            server, connection = self._server
            connection.send(None)
            server.wait(60)
            connection.close()
            self._server = None
            standin.forget(self._variables)


def main(descriptor: int, size: int) -> None:
    """Answers calls until there are no more."""
    connection = Connection(descriptor)
    current_process().authkey = connection.recv_bytes()  # tensors are sent by shared memory
    pool = Pool(size, "nccl")
    while (message := connection.recv()) is not None:
        world, module, name, arguments = message
        try:
            function = getattr(__import__(module, fromlist=[name]), name)
            connection.send((True, pool.run(world, function, *arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    pool.close()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(int(sys.argv[1]), int(sys.argv[2]))
