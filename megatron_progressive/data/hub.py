"""The rows of a Hugging Face data set, streamed, and gone on with where the stream breaks."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

from megatron_progressive.config import ConfigError, DataSection
from megatron_progressive.data.decoding import one_line

RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""How long to wait before each new try after a stream broke; a row that is read begins them
anew."""

STATE_ROWS = 1000
"""After how many rows the stream is asked where it is. Rows after that are passed over when it is
opened again."""


def hub_name(spec: str) -> tuple[str, str | None]:
    """The name and the configuration in ``hf:NAME`` or ``hf:NAME:CONFIG``."""
    name, _, configuration = spec.removeprefix("hf:").partition(":")
    return name, configuration or None


def data_files(data: DataSection, revision: str | None) -> int:
    """The number of data files that can be read on their own; what has no such files counts as
    one.

    Raises:
        ConfigError: the data set cannot be reached.
    """
    try:
        return int(getattr(_loaded(data, revision), "num_shards", 1))
    except Exception as error:
        raise _unreadable(data, error) from None


def _loaded(data: DataSection, revision: str | None) -> Any:
    import datasets

    name, configuration = hub_name(data.corpus)
    pinned = {} if revision is None else {"revision": revision}
    return datasets.load_dataset(name, configuration, split="train", streaming=True, **pinned)


def _unreadable(data: DataSection, error: Exception) -> ConfigError:
    return ConfigError(
        f"data.corpus: got {data.corpus!r}, which cannot be read ({one_line(error)}); "
        "accepted: the name of a data set with a train split, reachable from here"
    )


class HubRows:
    """The rows of a data set, or of one of its data files."""

    def __init__(
        self,
        data: DataSection,
        revision: str | None,
        data_file: int | None,
        position: dict[str, Any] | None,
        patient: bool,
    ) -> None:
        """Name the rows; nothing is opened yet.

        Args:
            data: the section that names the data set.
            revision: the commit that is read; None takes the newest one.
            data_file: the number of the data file; None takes all.
            position: the place to go on from, as :meth:`position` gave it.
            patient: whether a stream that breaks or cannot be opened is opened again.
        """
        self._data, self._revision, self._data_file = data, revision, data_file
        self._state: Any = None if position is None else position["state"]
        self._since: int = 0 if position is None else position["rows"]
        self._patient = patient
        self._seen = self._since  # as far as is known, for messages

    def position(self) -> dict[str, Any]:
        """Where the rows are, right after the last one that was given, as JSON can hold it."""
        return {"state": self._state, "rows": self._since}

    def rows(self) -> Iterator[Any]:
        """The rows from the position on.

        Raises:
            ConfigError: the data set cannot be read, also after the tries of
                :data:`RETRY_SECONDS`.
        """
        waits = iter(RETRY_SECONDS)
        while True:
            try:
                stream, rows = self._opened()
                while True:
                    row = next(rows, self)
                    if row is self:
                        return
                    self._count(stream)
                    waits = iter(RETRY_SECONDS)
                    yield row
            except ConfigError:
                raise
            except Exception as error:  # what the library raises is as varied as its sources
                self._wait(next(waits, None) if self._patient else None, error)

    def _opened(self) -> tuple[Any, Iterator[Any]]:
        stream = _loaded(self._data, self._revision)
        if self._data_file is not None:
            stream = stream.shard(num_shards=stream.num_shards, index=self._data_file)
        if self._state is not None:
            stream.load_state_dict(self._state)
        return stream, itertools.islice(iter(stream), self._since, None)

    def _count(self, stream: Any) -> None:
        self._since += 1
        self._seen += 1
        if self._since >= STATE_ROWS and hasattr(stream, "state_dict"):
            self._state, self._since = stream.state_dict(), 0

    def _wait(self, seconds: float | None, error: Exception) -> None:
        """Wait for the next try, and say so.

        Raises:
            ConfigError: there is none.
        """
        if seconds is None:
            raise _unreadable(self._data, error) from None
        place = "" if self._data_file is None else f" in data file {self._data_file}"
        print(
            f"data: {self._data.corpus} broke off{place} after row {self._seen} "
            f"({one_line(error)}); goes on from there in {seconds:g} s",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(seconds)
