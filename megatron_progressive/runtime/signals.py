"""Signals that ask a job to stop: taken note of, acted on at the next step boundary."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """True once SIGTERM, SIGUSR1 or SIGINT has arrived; restores the handlers on exit."""

    def __init__(self) -> None:
        self.raised = False
        self._previous: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.raised = True

    def __enter__(self) -> StopFlag:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
