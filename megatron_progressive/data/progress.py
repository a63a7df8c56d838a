"""Progress of a preparation: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, bytes of text done, and bytes in all where that is known."""

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def show_progress() -> Iterator[Progress]:
    """A :data:`Progress` that shows on standard error."""
    if sys.stderr.isatty():
        with _bar() as progress:
            yield progress
    else:
        yield _lines()


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Bar(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        tasks: dict[str, object] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield show


def _lines() -> Progress:
    last_stage, last_time = "", 0.0

    def show(stage: str, done: int, total: int | None) -> None:
        nonlocal last_stage, last_time
        now = time.monotonic()
        if stage == last_stage and now - last_time < SECONDS_BETWEEN_LINES:
            return
        last_stage, last_time = stage, now
        amount = f" {done / 1e6:.1f} MB" if done else ""
        of = f" of {total / 1e6:.1f} MB" if done and total else ""
        say(f"{stage}{amount}{of}")

    return show


def say(line: str) -> None:
    """Show a line about the corpus on standard error."""
    print(f"data: {line}", file=sys.stderr, flush=True)
