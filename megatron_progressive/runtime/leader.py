"""What rank 0 does alone before there is a process group, however long it takes.

The ranks meet in the store that the process group uses later (:mod:`.rendezvous`). The ranks that
wait there look now and then: no time limit ends their wait, but the failure or the death of rank 0
does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from megatron_progressive.config import ConfigError
from megatron_progressive.runtime.distributed import Place, prepare_imports
from megatron_progressive.runtime.rendezvous import meet

POLL_SECONDS = 1.0
"""The seconds between two looks of a rank that waits."""

SILENT_SECONDS = 5.0
"""A rank that waits longer than so many seconds says so."""

HEARD_SECONDS = 10.0
"""How many seconds a rank 0 that has failed and holds the store stays, so that the others hear of
it."""


class LeaderFailed(RuntimeError):
    """Rank 0 could not do what the other ranks waited for."""


class Leader:
    """The ranks of a job around rank 0. Keep this object until the process group is there: rank 0
    may hold the store of both."""

    def __init__(self, place: Place | None) -> None:
        """Meet the other ranks; outside of a job, and in a job of a single rank, there is nobody to
        meet.

        Raises:
            TimeoutError: not all ranks came in time.
        """
        self._place = place
        self.store: Any = None
        """The store in which the ranks meet, which serves the process group as well; None where
        there is nobody to meet."""
        if place is None or place.world == 1:
            return
        prepare_imports()
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        self.store = meet(place.rank, place.local_rank, place.world)
        self._store = PrefixStore("leader", self.store)

    @property
    def is_me(self) -> bool:
        """Whether this rank is rank 0, the one that acts."""
        return self._place is None or self._place.rank == 0

    def does(self, act: Callable[[], Any], what: str) -> Any:
        """What ``act`` returns on rank 0, on every rank; to be called once on each of them.

        Args:
            act: a function that is called on rank 0 alone and returns what JSON can hold.
            what: what rank 0 does, to tell the ranks that wait, as ``prepares the corpus``.

        Raises:
            ConfigError: ``act`` raised it on rank 0; every rank has the same line.
            LeaderFailed: on the other ranks, where rank 0 failed in another way or is gone.
        """
        if self.store is None:
            return act()
        if not self.is_me:
            return self._waited_for(what)
        try:
            answer = {"done": act()}
        except BaseException as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            key = "refused" if isinstance(error, ConfigError) else "failed"
            self._store.set("answer", json.dumps({key: cause}))
            self._stay_until_heard()
            raise
        self._store.set("answer", json.dumps(answer))
        return answer["done"]

    def _waited_for(self, what: str) -> Any:
        assert self._place is not None
        # one line a host is enough
        speaks = self._place.rank == 1 or self._place.local_rank == 0
        start = time.monotonic()
        try:
            while not self._store.check(["answer"]):
                if speaks and time.monotonic() - start > SILENT_SECONDS:
                    print(
                        f"rank {self._place.rank}: waits while rank 0 {what}",
                        file=sys.stderr,
                        flush=True,
                    )
                    speaks = False
                time.sleep(POLL_SECONDS if time.monotonic() - start > POLL_SECONDS else 0.05)
            answer = json.loads(self._store.get("answer"))
            self._store.add("heard", 1)
        except RuntimeError:  # the store went with it
            raise LeaderFailed(f"rank 0, which {what}, has ended") from None
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        if "failed" in answer:
            raise LeaderFailed(f"rank 0, which {what}, failed: {answer['failed']}")
        return answer["done"]

    def _stay_until_heard(self) -> None:
        assert self._place is not None
        deadline = time.monotonic() + HEARD_SECONDS
        while time.monotonic() < deadline:
            if self._store.add("heard", 0) >= self._place.world - 1:
                return
            time.sleep(0.05)
