"""Where the ranks of a job meet: in a store that rank 0 or their launcher holds."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

TIMEOUT = timedelta(minutes=30)

FIRST_NOTE_SECONDS = 5.0
"""How many seconds ranks wait before they say so; the time from one note to the next doubles, up to
the most below."""
LONGEST_SILENCE_SECONDS = 300.0

_POLL_SECONDS = 0.05


def meet(rank: int, local_rank: int, world: int) -> Any:
    """The job's store, once all of its ranks have come to ``MASTER_ADDR:MASTER_PORT``.

    While it waits it says how many ranks are missing. Torch's ``env://`` would wait in silence, and
    where Ctrl-C does not reach it.

    Raises:
        TimeoutError: not all ranks came within :data:`TIMEOUT`.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = f"{address}:{port}"
    # torchrun's agent and ``mprog train --nproc`` hold the store themselves
    held_by_us = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not held_by_us:
        holder = "the launcher" if rank == 0 else "rank 0"
        notes = _Notes(shows=local_rank == 0)
        _until(
            lambda: _answers(address, port),
            lambda: notes.perhaps(f"waiting for {holder} at {place}"),
            f"{holder} did not come to {place}",
        )
    held = TCPStore(
        address, port, is_master=held_by_us, timeout=TIMEOUT, wait_for_workers=False,
        multi_tenant=held_by_us,
    )  # fmt: skip
    # of this try: those that torchrun has started anew do not meet at the marks of before
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"ranks of try {attempt}", held)
    notes, here = _Notes(shows=rank == 0), int(store.add("here", 1))

    def missing() -> str:
        return "1 rank" if here == world - 1 else f"{world - here} ranks"

    def all_here() -> bool:
        nonlocal here
        here = int(store.add("here", 0))
        return here >= world

    _until(
        all_here,
        lambda: notes.perhaps(f"waiting for {missing()} at {place} ({here} here)"),
        f"not all of {world} ranks came to {place}",
    )
    return store


def store_answers() -> bool:
    """Whether the job's store still answers, which a new connection would take its whole time limit
    to find out. True where the store has no address."""
    if "MASTER_ADDR" not in os.environ:
        return True
    return _answers(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


def _until(done: Callable[[], bool], wait: Callable[[], None], failure: str) -> None:
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not done():
        if time.monotonic() > deadline:
            minutes = TIMEOUT.total_seconds() / 60
            raise TimeoutError(f"{failure} within {minutes:.0f} minutes")
        wait()
        time.sleep(_POLL_SECONDS)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:  # also a name that is not known yet
        return False
    return True


class _Notes:
    """Notes about a wait, at growing intervals."""

    def __init__(self, shows: bool) -> None:
        self._shows, self._pause = shows, FIRST_NOTE_SECONDS
        self._next = time.monotonic() + self._pause

    def perhaps(self, line: str) -> None:
        if self._shows and time.monotonic() >= self._next:
            print(line, file=sys.stderr, flush=True)
            self._pause = min(2 * self._pause, LONGEST_SILENCE_SECONDS)
            self._next = time.monotonic() + self._pause
