"""A pool of worker processes for distributed tests: real ranks over gloo, started once.

They are forked from one process that has imported everything, and serve all tests. The function
given to :meth:`Pool.run` is imported by name in each worker and called as
``function(*arguments)`` inside a world group of the ranks asked for.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 600
THREADS = 60
"""Fewer than these a rank may have after a call. A group on gloo that something keeps has three,
which poll: hundreds of them make everything else slow."""


def _worker(connection: Connection, rank: int, backend: str) -> None:
    import psutil
    import torch
    import torch.distributed as dist

    import tests.warm  # noqa: F401

    modules = 0
    while True:
        if len(sys.modules) > modules:  # what was imported stays: engines that close collect often
            modules = len(sys.modules)
            gc.collect()
            gc.freeze()
        message = connection.recv()
        if message is None:
            return
        module, name, arguments, world, port = message
        try:
            store = dist.TCPStore("127.0.0.1", port)
            if backend == "nccl":
                torch.cuda.set_device(rank)
            dist.init_process_group(backend, rank=rank, world_size=world, store=store)
            try:
                function = getattr(__import__(module, fromlist=[name]), name)
                result = function(*arguments)
            finally:
                dist.destroy_process_group()
            threads = psutil.Process().num_threads()
            assert threads < THREADS or backend != "gloo", (
                f"{threads} threads: process groups of closed engines stay"
            )
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class Pool:
    """Up to ``size`` ranks. A failed call replaces the workers, whose groups may hang."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self._size, self._backend = size, backend
        self._workers: list[tuple[Any, Connection]] = []

    def _start(self, world: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.warm"])
        for rank in range(len(self._workers), world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker, args=(theirs, rank, self._backend), daemon=True
            )
            process.start()
            self._workers.append((process, ours))

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(*arguments)`` on ranks 0..world-1; returns their results.

        Raises:
            AssertionError: with the traceback of the first rank that failed.
        """
        assert world <= self._size
        self._start(world)
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for _, connection in self._workers[:world]:
            connection.send((function.__module__, function.__name__, arguments, world, store.port))
        ranks = {connection: rank for rank, (_, connection) in enumerate(self._workers[:world])}
        results: dict[int, Any] = {}
        while len(results) < world:  # in the order of arrival: a failed rank leaves others hanging
            waiting = [c for c, rank in ranks.items() if rank not in results]
            ready = multiprocessing.connection.wait(waiting, TIMEOUT_S)
            if not ready:
                self.close()
                raise AssertionError(
                    f"of {world} ranks {sorted(results)} answered in {TIMEOUT_S} s"
                )
            for connection in ready:
                rank = ranks[connection]  # type: ignore[index]
                ok, results[rank] = connection.recv()  # type: ignore[union-attr]
                if not ok:
                    self.close()
                    raise AssertionError(f"rank {rank}:\n{results[rank]}")
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []
