"""What a command that takes a while says meanwhile: a live line on a terminal, and in a log a line
now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Task, TaskID
    from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
"""Seconds between two lines of one stage in a log."""

Advance = Callable[[int], None]
"""Called with the number of bytes that were done since the last call."""

Say = Callable[[str], None]
"""Called with what is being done now."""

ShowBytes = Callable[[str, int, int | None], None]
"""Called with what is being done, the bytes of it that are done, and the bytes that it has in all,
or None where that number is not known."""


def short_time(seconds: float) -> str:
    """``1h05m``, ``4m10s`` or ``12s``."""
    whole = max(0, round(seconds))
    hours, minutes, seconds = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


@contextmanager
def show_bytes(title: str, total: int) -> Iterator[Advance]:
    """Show on standard error how many of ``total`` bytes are done, and the time left."""
    with _drawn() if sys.stderr.isatty() else nullcontext(_Printed("", several=False)) as show:
        done = 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            show(title, done, total)

        show(title, 0, total)
        yield advance


@contextmanager
def show_byte_stages(prefix: str) -> Iterator[ShowBytes]:
    """Show several stages of one command on standard error: the bytes of each that are done, and
    the time left where their number is known.

    Args:
        prefix: what lines in a log begin with; a terminal shows the stage alone.
    """
    printed = _Printed(f"{prefix}: ", several=True)
    with _drawn() if sys.stderr.isatty() else nullcontext(printed) as show:
        yield show


@contextmanager
def show_stages(title: str) -> Iterator[Say]:
    """Show on standard error what is being done now: on a terminal in one live line, in a log in a
    line now and then, and not at all where everything takes a few seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(escape(title)) as status:
            yield lambda text: status.update(escape(f"{title}: {text}"))
        return
    last = time.monotonic()

    def say(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{title}: {text}", file=sys.stderr, flush=True)

    yield say


@contextmanager
def _drawn() -> Iterator[ShowBytes]:
    """Show one bar for each stage on a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    class TimeColumn(TimeRemainingColumn):
        """The time left; the time taken of a stage that is done or whose end is not known."""

        def render(self, task: Task) -> Text:
            if task.finished or task.total is None:
                return TimeElapsedColumn().render(task)
            return super().render(task)

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(escape(stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


class _Printed:
    """Lines in a log: one every :data:`SECONDS_BETWEEN_LINES` of a stage; of several stages one
    when each begins, of a single one a line when all of its bytes are done."""

    def __init__(self, prefix: str, several: bool) -> None:
        self._prefix, self._several = prefix, several
        self._stage: str | None = None
        self._started = self._last = 0.0
        self._begun = 0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        begins, ends = stage != self._stage, done == total
        if begins:
            self._stage, self._started, self._last, self._begun = stage, now, now, done
        due = now - self._last >= SECONDS_BETWEEN_LINES
        if not (due or (begins if self._several else ends)):
            return
        self._last = now
        text = f"{self._prefix}{stage}" + ":" * (not self._several)
        # what was done before goes on here: it took no time of this process
        mine, taken = done - self._begun, now - self._started
        rate = f", {mine / taken / 1e6:.1f} MB/s" if mine and taken else ""
        if done and total:
            text += f" {done / 1e6:.1f} of {total / 1e6:.1f} MB"
            if ends:
                text += f", {short_time(taken)}"
            elif rate:
                text += f"{rate}, left {short_time(taken * (total - done) / mine)}"
        elif done:
            text += f" {done / 1e6:.1f} MB{rate}"
        print(text, file=sys.stderr, flush=True)
