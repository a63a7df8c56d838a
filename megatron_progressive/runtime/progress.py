"""Progress of one command: a live line on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int], None]
"""Called with the bytes that were done since the last call."""


Say = Callable[[str], None]
"""Called with what is being done now."""


def short_time(seconds: float) -> str:
    """``1h05m``, ``4m10s`` or ``12s``."""
    whole = max(0, round(seconds))
    hours, minutes, seconds = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


@contextmanager
def show_bytes(title: str, total: int) -> Iterator[Advance]:
    """Show bytes done of ``total``, and the time left, on standard error."""
    if sys.stderr.isatty():
        with _bar(title, total) as advance:
            yield advance
    else:
        yield _lines(title, total)


@contextmanager
def show_stages(title: str) -> Iterator[Say]:
    """Show what is being done now, on standard error: on a terminal in one live line, elsewhere in
    a line now and then, none for what takes a few seconds."""
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
def _bar(title: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def _lines(title: str, total: int) -> Advance:
    started = last = time.monotonic()
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done, last
        done += nbytes
        now = time.monotonic()
        if done < total and now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        left = (now - started) * (total - done) / max(1, done)
        amount = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
        time_text = f"left {short_time(left)}" if done < total else short_time(now - started)
        print(f"{title}: {amount}, {time_text}", file=sys.stderr, flush=True)

    return advance
