"""Metrics and summaries as they are read: what is damaged takes nothing else with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive.runs.files import (
    is_finished,
    read_metrics,
    read_summary,
    validation_at,
)
from megatron_progressive.runtime.files import json_text, write_json

LINES = [json.dumps({"event": "train", "step": step, "loss": 2.0}).encode() for step in range(9)]


def metrics(folder: Path, lines: list[bytes], end: bytes = b"\n") -> Path:
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + end)
    return folder


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"event": "train", "step": 3, "lo',
        LINES[3] + LINES[3],
        b"\0" * 40,
        b"\xff\xfe" + LINES[3],
        b"[3]",
        b"3",
        b"{}",
        b'{"event": "train"}',
        b'{"event": "eval", "step": null}',
        b'{"event": "train", "step": "3"}',
        b'{"event": 3, "step": 3}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_named_and_no_other_is_lost(tmp_path: Path, damaged: bytes) -> None:
    found = read_metrics(metrics(tmp_path, [*LINES[:3], damaged, *LINES[4:]]))
    assert [e["step"] for e in found.events] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert found.damaged == {4: damaged}
    assert "line 4 of metrics.jsonl" in found.describe_damage()


def test_many_damaged_lines_are_counted(tmp_path: Path) -> None:
    text = read_metrics(metrics(tmp_path, [b"?"] * 30)).describe_damage()
    assert text == "lines 1, 2, 3, 4, 5, … of metrics.jsonl cannot be read (30 left out)"


def test_a_last_line_that_is_not_ended_is_no_damage(tmp_path: Path) -> None:
    found = read_metrics(metrics(tmp_path, [*LINES[:3], LINES[3][:20]], end=b""))
    assert (len(found.events), found.damaged) == (3, {})
    found = read_metrics(metrics(tmp_path, LINES[:3], end=b""))  # cut right before its end
    assert (len(found.events), found.damaged) == (3, {})


def test_no_metrics_are_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path).events == []
    assert read_metrics(tmp_path).describe_damage() == ""


@pytest.mark.parametrize(
    ("summary", "finished"),
    [
        ({"steps": 20, "final_eval_loss": 1.5}, True),
        ({"steps": 21, "final_eval_loss": 1}, True),
        ({"steps": 19, "final_eval_loss": 1.5}, False),
        ({"steps": 20, "final_eval_loss": None}, False),
        ({"steps": 20, "final_eval_loss": math.nan}, False),
        ({"steps": 20, "final_eval_loss": math.inf}, False),
        ({"steps": 20, "final_eval_loss": "1.5"}, False),
        ({"steps": 20}, False),
        ({"final_eval_loss": 1.5}, False),
        ({"steps": None, "final_eval_loss": 1.5}, False),
    ],
)
def test_a_run_is_finished_with_a_result(
    tmp_path: Path, summary: dict[str, Any], finished: bool
) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found, problem = read_summary(tmp_path)
    assert problem == ""
    assert is_finished(found, 20) == finished


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"steps": 20, "final', "\0\0"])
def test_a_summary_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    found, problem = read_summary(tmp_path)
    assert found is None
    assert "summary.json is cut or no JSON object" in problem
    assert not is_finished(found, 0)


def test_the_validation_of_a_step_is_its_last_one() -> None:
    events = [
        {"event": "eval", "step": 10, "loss": 3.0},
        {"event": "eval", "step": 20, "loss": 2.5},
        {"event": "eval", "step": 20, "loss": 2.0},
        {"event": "eval", "step": 30, "loss": None},
        {"event": "train", "step": 40, "loss": 2.0},
    ]
    found = [validation_at(events, step) for step in (10, 20, 30, 40)]
    assert found == [events[0], events[2], None, None]


def test_json_is_strict(tmp_path: Path) -> None:
    values = {"a": math.nan, "b": [1.0, -math.inf], "c": {"d": (math.inf, "NaN")}}
    wanted = {"a": None, "b": [1.0, None], "c": {"d": [None, "NaN"]}}
    assert json.loads(json_text(values)) == wanted
    write_json(tmp_path / "x.json", values)
    assert json.loads((tmp_path / "x.json").read_text()) == wanted
