"""What a command that takes a while says meanwhile."""

from __future__ import annotations

import pytest

from megatron_progressive.runtime import progress


def test_stages_are_said_once_they_take_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.show_stages("report of x") as say:
        for seconds in range(25):
            now = float(seconds)
            say(f"law {seconds}")
    assert capsys.readouterr().err.splitlines() == ["report of x: law 10", "report of x: law 20"]
