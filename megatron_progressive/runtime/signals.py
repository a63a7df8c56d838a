"""Signals that ask a job to stop: they are noted, and acted on at the next step boundary."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of a command that Ctrl-C ended before there was anything to save, as shells have
it."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, SIGUSR1, SIGINT and SIGHUP. SIGHUP is left out where it is ignored: ``nohup`` asked
    for a run that outlives its terminal."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return numbers
    return (*numbers, signal.SIGHUP)


class StopFlag:
    """A flag that is true once one of :func:`stop_signals` has arrived; it restores the handlers on
    exit."""

    def __init__(self) -> None:
        self.raised = False
        self._previous: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.raised = True

    def __enter__(self) -> StopFlag:
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


@contextlib.contextmanager
def outlives_its_reader() -> Iterator[None]:
    """A context for printing what a job can do without. Where the terminal is closed or the reader
    of a pipe is gone, output goes nowhere from then on and the job continues; where the disk of a
    log is full, it waits."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                _silence_where_broken(stream.fileno())


def _silence_where_broken(descriptor: int) -> None:
    try:
        os.write(descriptor, b"")  # a closed terminal refuses that, too; a pipe does not
        broken = _is_broken_pipe(descriptor)
    except OSError:
        broken = True
    if broken:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _is_broken_pipe(descriptor: int) -> bool:
    import select

    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
