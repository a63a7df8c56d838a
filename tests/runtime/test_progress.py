"""What a command that takes a while says meanwhile."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from megatron_progressive.runtime import progress


class Clock:
    """A clock that stands where a test sets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


class Terminal(io.StringIO):
    """Standard error as a terminal has it."""

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> str:
        """What was drawn, without colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


def test_stages_are_said_once_they_take_long(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.show_stages("report of x") as say:
        for seconds in range(25):
            clock.now = float(seconds)
            say(f"law {seconds}")
    assert capsys.readouterr().err.splitlines() == ["report of x: law 10", "report of x: law 20"]


def test_a_log_has_a_line_when_a_stage_begins_and_one_every_ten_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.show_byte_stages("data") as show:
        show("training a tokenizer on c", 0, None)
        clock.now = 100.0
        for second in range(31):
            clock.now = 100.0 + second
            show("tokenizing c", second * 1_000_000, 40_000_000)
        clock.now = 140.0
        show("tokenizing c", 41_000_000, None)  # more than the size on disk: compressed
    assert capsys.readouterr().err.splitlines() == [
        "data: training a tokenizer on c",
        "data: tokenizing c",
        "data: tokenizing c 10.0 of 40.0 MB, 1.0 MB/s, left 30s",
        "data: tokenizing c 20.0 of 40.0 MB, 1.0 MB/s, left 20s",
        "data: tokenizing c 30.0 of 40.0 MB, 1.0 MB/s, left 10s",
        "data: tokenizing c 41.0 MB, 1.0 MB/s",
    ]


def test_what_was_done_before_took_no_time(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.show_byte_stages("data") as show:
        show("tokenizing c", 30_000_000, 40_000_000)
        clock.now = 10.0
        show("tokenizing c", 35_000_000, 40_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "data: tokenizing c 30.0 of 40.0 MB",
        "data: tokenizing c 35.0 of 40.0 MB, 0.5 MB/s, left 10s",
    ]


def test_a_log_has_a_line_when_all_bytes_are_done(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.show_bytes("export", 3_000_000) as advance:
        for second in range(1, 4):
            clock.now = float(second)
            advance(1_000_000)
    assert capsys.readouterr().err.splitlines() == ["export: 3.0 of 3.0 MB, 3s"]


def test_a_terminal_shows_the_time_left_where_the_total_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    with progress.show_byte_stages("data") as show:
        show("[unnamed]", 1_000_000, None)
        for step in range(4):
            time.sleep(0.02)
            show("tokenizing c", step * 1_000_000, 10**12)
    unknown, known = terminal.shown.splitlines()[-2:]
    assert re.search(r"\[unnamed\] .* 1\.0/\? MB .* 0:00:0\d", unknown), unknown
    assert re.search(r"tokenizing c .* 0\.0/1\.0 TB .* [1-9]\d*:\d\d:\d\d", known), known
