"""The page of ``agreement.py``, in Markdown, from its lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Line = dict[str, Any]

TOLERANCE = {"fp32": (5e-6, 5e-5), "bf16": (1e-2, 5e-2)}
"""Largest relative difference of losses and of gradient norms, by the precision."""


def _tolerance(line: Line) -> tuple[float, float]:
    return TOLERANCE[line["case"]["layers"][-4:]]


def differs(line: Line) -> list[str]:
    """Tensors whose bits are not those that they should be."""
    names = [name for tensors in line["unequal"] for name in tensors]
    return [*names, *([] if line["initial_equal"] else ["the state before the first step"])]


def beyond(line: Line) -> str:
    """Why a case is not as it should be; empty where it is."""
    if "error" in line:
        return str(line["error"])
    if names := differs(line):
        return f"not bit-equal: {', '.join(names[:3])}"
    loss, norm = _tolerance(line)
    if max(line["loss"], line["across"]) > loss:
        return f"losses differ by more than {loss:g}"
    return f"gradient norms differ by more than {norm:g}" if line["norm"] > norm else ""


def page(lines: list[Line], impossible: list[str], left_out: int) -> str:
    """Summaries by value, all cases, and what could not be run."""
    good = [line for line in lines if "error" not in line]
    unequal = sum(len(differs(line)) for line in good)
    tensors = sum(line["tensors"] for line in good)
    parts = [
        f"{len(lines)} cases, {len(lines) - len(good)} failed, "
        f"{sum(bool(beyond(line)) for line in lines)} not as they should be. "
        f"Bit equality after expansions: of {tensors:,} tensors {unequal} differ.",
        "## By value\nLargest relative difference from the CPU path: losses (of steps, and before "
        "and after expansions) | gradient norms.",
        _table(("", "cases", *TOLERANCE), _by_value(good)),
        "## Cases",
        _table(
            ("case", "ranks", "losses", "across τ", "norms", "not bit-equal"),
            (_row(line) for line in lines),
        ),
    ]
    if left_out:
        parts.append(f"Left out, without Transformer Engine: {left_out} cases.")
    if impossible:
        parts.append("Pairs that no run can have: " + "; ".join(impossible) + ".")
    return "\n\n".join(parts) + "\n"


def _by_value(lines: list[Line]) -> Iterable[tuple[str, ...]]:
    values = dict.fromkeys(
        (factor, line["case"][factor])
        for factor in (lines[0]["case"] if lines else ())
        for line in lines
    )
    for factor, value in values:
        those = [line for line in lines if line["case"][factor] == value]
        cells = []
        for precision in TOLERANCE:
            of = [line for line in those if line["case"]["layers"].endswith(precision)]
            loss = max((max(line["loss"], line["across"]) for line in of), default=None)
            norm = max((line["norm"] for line in of), default=None)
            cells.append("-" if loss is None else f"{loss:.1e}, {norm:.1e}")
        yield f"{factor}: {value}", str(len(those)), *cells


def _row(line: Line) -> tuple[str, ...]:
    if "error" in line:
        return line["name"], str(line["ranks"]), line["error"], "", "", ""
    numbers = (f"{line[key]:.1e}" for key in ("loss", "across", "norm"))
    return line["name"], str(line["ranks"]), *numbers, str(len(differs(line)))


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = tuple(columns)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
