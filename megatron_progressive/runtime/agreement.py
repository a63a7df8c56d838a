"""All ranks succeed or all fail: a section that fails on one rank fails on every rank, with that
rank's error."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from megatron_progressive.runtime.files import WriteFailed
from megatron_progressive.runtime.rendezvous import store_answers
from megatron_progressive.runtime.tied import starter_gone

POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0
"""How many seconds a rank that waits for a failed one has to notice the failure by itself."""


class RankFailed(RuntimeError):
    """Another rank failed; the message is the error of that rank."""


class FailedElsewhere(RuntimeError):
    """A collective operation failed because another rank did; that rank will say why."""


def cause_line(rank: int, error: BaseException) -> str:
    """The last line that a rank prints: which rank it is, and what ended it."""
    line = " ".join(str(error).split()) or "no message"
    kind = "" if isinstance(error, WriteFailed) else f"{type(error).__name__}: "
    return f"rank {rank}: {kind}{line}"


@contextmanager
def all_succeed(section: str) -> Iterator[None]:
    """Run a section that all ranks must finish; no rank leaves it before all have finished it.

    The first rank to fail posts its error in the job's store. A rank that waits for it returns when
    its connection breaks (gloo), or is ended after :data:`GRACE_SECONDS` (NCCL would go on
    waiting): no rank hangs, and the last line of every rank is the cause. Where the store is gone
    with the launcher, ranks still finish, without another rank's error.

    Args:
        section: the name of the section, which is used once in a job and is the same on every rank.

    Raises:
        RankFailed: another rank failed first.
    """
    if dist.get_world_size() == 1:
        yield
        return
    rank, store, key = dist.get_rank(), c10d._get_default_store(), f"failed/{section}"
    over = threading.Event()
    if starter_gone.is_set() or not store_answers():  # there is no hearing from others
        yield
        dist.barrier()
        return
    connection = store.clone()  # type: ignore[attr-defined]  # a wait on one holds its lock
    watcher = threading.Thread(target=_watch, args=(connection, key, rank, over), daemon=True)
    watcher.start()
    try:
        yield
        dist.barrier()
    except FailedElsewhere as error:
        raise RankFailed(_posted(store, key) or str(error)) from None
    except BaseException as error:
        own = cause_line(rank, error)
        first = _post(store, key, own)
        if first != own:
            raise RankFailed(first) from error
        raise
    finally:
        over.set()
        watcher.join()


def _post(store: Any, key: str, cause: str) -> str:
    """Post an error unless one is there already; returns the error that is there."""
    try:
        posted: bytes = store.compare_set(key, "", cause)
    except RuntimeError:  # the store went with its rank
        return cause
    return posted.decode()


def _posted(store: Any, key: str) -> str:
    """The error that another rank is about to post; empty where none is posted in time."""
    try:
        store.wait([key], timedelta(seconds=GRACE_SECONDS))
        cause: bytes = store.get(key)
    except RuntimeError:
        return ""
    return cause.decode()


def _watch(store: Any, key: str, rank: int, over: threading.Event) -> None:
    while not over.wait(POLL_SECONDS):
        try:
            cause = store.get(key).decode() if store.check([key]) else ""
        except RuntimeError:
            cause = "the rank that holds the job's store is gone"
        if cause and not over.wait(GRACE_SECONDS):
            if starter_gone.is_set():
                return  # it held the store: this rank may be saving
            print(f"rank {rank}: RankFailed: {cause}", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread waits in a collective that cannot end
