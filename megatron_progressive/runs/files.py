"""What a run writes beside its checkpoints, ``metrics.jsonl`` and ``summary.json``, as it is read
by whoever goes on with the run or reports it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS_FILE, SUMMARY_FILE = "metrics.jsonl", "summary.json"

_NUMBERED = ("train", "eval", "checkpoint", "expansion", "resume")
"""The events that mean nothing without their step."""


@dataclass(frozen=True)
class Metrics:
    """The events of a ``metrics.jsonl``."""

    events: list[dict[str, Any]] = field(default_factory=list)
    damaged: dict[int, bytes] = field(default_factory=dict)
    """The lines that hold no event, by their number from 1. A last line without an end does not
    count as such: a kill cut it, or the run is about to write the rest of it."""

    def describe_damage(self) -> str:
        """The damage in one line of text; empty where all lines hold events."""
        if not self.damaged:
            return ""
        numbers = [str(number) for number in self.damaged]
        shown = ", ".join(numbers[:5]) + (", …" if len(numbers) > 5 else "")
        lines = f"line{'s' * (len(numbers) > 1)} {shown} of {METRICS_FILE}"
        return f"{lines} cannot be read ({len(numbers)} left out)"


def read_metrics(folder: Path) -> Metrics:
    """The metrics of a run folder; empty where it has none. Lines that a disk or an editor has
    broken are left out and named (:attr:`Metrics.damaged`); the lines after them are read."""
    path, found = folder / METRICS_FILE, Metrics()
    if not path.is_file():
        return found
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        event = _event(line)
        if event is not None:
            found.events.append(event)
        elif line.strip():
            found.damaged[number] = line
    event = _event(last)
    if event is not None:
        found.events.append(event)
    return found


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(kind := event.get("event"), str):
        return None
    step = event.get("step", None if kind in _NUMBERED else 0)
    return event if isinstance(step, int) and not isinstance(step, bool) else None


def read_summary(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The ``summary.json`` of a run folder, and what is wrong with it in one line.

    Returns: The summary, or None where there is none, or where it is empty, cut or no object; and a
        line that is empty where nothing is wrong.
    """
    path = folder / SUMMARY_FILE
    try:
        loaded = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except (ValueError, RecursionError):
        loaded = None
    if not isinstance(loaded, dict):
        return None, f"{path} is cut or no JSON object: the run counts as not finished"
    return loaded, ""


def finite(value: Any) -> float | None:
    """The value itself where it is a finite number; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def is_finished(summary: dict[str, Any] | None, last_step: int) -> bool:
    """Whether a summary is of a run that came to ``last_step`` or further and has a result there,
    which is a validation loss that is a number."""
    if summary is None or finite(summary.get("final_eval_loss")) is None:
        return False
    steps = summary.get("steps")
    return isinstance(steps, int) and steps >= last_step


def validation_at(events: list[dict[str, Any]], step: int) -> dict[str, Any] | None:
    """The validation after ``step``, as its event has it; None where there was none, or where its
    loss is not finite."""
    found = [e for e in events if e["event"] == "eval" and e["step"] == step]
    return found[-1] if found and finite(found[-1].get("loss")) is not None else None
