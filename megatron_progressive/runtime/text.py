"""Numbers and tables as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # plan.py offers render() beside make_plan()
    pass


_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"), (1.0, ""))


def short_counts(counts: list[int]) -> list[str]:
    """Counts in the unit of the largest one, with two significant digits or more: 0.15B, 7.0B,
    124M."""
    factor, unit = next((f, u) for f, u in _UNITS if max(counts) >= f or f == 1.0)
    return [_digits(count / factor) + unit for count in counts]


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    decimals = 2 if value < 0.995 else 1 if value < 9.95 else 0
    return f"{value:.{decimals}f}"


def flops_text(flops: float) -> str:
    """FLOPs as ``1.23e+21``."""
    return f"{flops:.3g}" if flops < 1e4 else f"{flops:.2e}"


def aligned(rows: list[list[str]], gap: int = 3) -> list[str]:
    """A table as text: the first column is aligned to the left, the others to the right, with
    ``gap`` blanks between columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + (" " * gap).join(cells).rstrip())
    return lines


def time_text(seconds: float) -> str:
    """``12.3 s``, ``4 min 05 s``, ``3 h 20 min`` or ``12.5 days``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds < 48 * 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{seconds / 86400:.1f} days"
