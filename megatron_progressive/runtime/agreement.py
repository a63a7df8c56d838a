"""All ranks or none: a section that fails on one rank fails on every rank, with its error."""

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
"""How long a rank that waits for a failed one may take to notice by itself."""


class RankFailed(RuntimeError):
    """Another rank failed; the message is that rank's error."""


class FailedElsewhere(RuntimeError):
    """A collective operation failed on another rank and does not say why: that rank will."""


def cause_line(rank: int, error: BaseException) -> str:
    """A rank's last line: which one, and what ended it."""
    line = " ".join(str(error).split()) or "no message"
    kind = "" if isinstance(error, WriteFailed) else f"{type(error).__name__}: "
    return f"rank {rank}: {kind}{line}"


@contextmanager
def all_succeed(section: str) -> Iterator[None]:
    """Run a section that all ranks must finish; none leaves it before all have.

    The first rank to fail posts its error in the job's store. A rank that waits for it gets
    out when its connection breaks (gloo), or is ended after :data:`GRACE_SECONDS` (NCCL would
    wait on): nobody hangs, and every rank's last line is the cause. Where the store went with the
    launcher, ranks still finish what needs no other's error.

    Args:
        section: a name that is used once in a job, the same on every rank.

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
    """Post an error unless one is there; returns the one that is there."""
    try:
        posted: bytes = store.compare_set(key, "", cause)
    except RuntimeError:  # the store went with its rank
        return cause
    return posted.decode()


def _posted(store: Any, key: str) -> str:
    """The error that another rank is about to post; empty where none comes."""
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
