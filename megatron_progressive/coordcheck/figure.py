"""What a coordinate check shows: a figure, a JSON file and a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from megatron_progressive.compare.drawing import save
from megatron_progressive.coordcheck.check import (
    CHANGE,
    DEPTH,
    QUANTITIES,
    RMS,
    WIDTH,
    CoordinateCheck,
)
from megatron_progressive.runtime.files import write_json

_COLOURS = dict(zip(QUANTITIES, ("#0072B2", "#CC79A7", "#D55E00", "#009E73"), strict=True))
_TITLES = {RMS: "RMS at initialisation", CHANGE: "RMS of the change after {} steps"}
PNG, JSON = "coordcheck.png", "coordcheck.json"


def write(check: CoordinateCheck, shapes: Sequence[tuple[str, int, int]], out: Path) -> None:
    """Write ``coordcheck.png`` and ``coordcheck.json`` into ``out``, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / JSON, check.to_values())
    figure = Figure(figsize=(11, 8), dpi=130, layout="constrained")
    last = max(m.step for m in check.measurements)
    for row, kind in enumerate((RMS, CHANGE)):
        for column, axis in enumerate((WIDTH, DEPTH)):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            for found in (s for s in check.slopes if (s.axis, s.kind) == (axis, kind)):
                points = sorted(
                    (w if axis == WIDTH else d, getattr(m, kind))
                    for a, w, d in shapes
                    for m in check.measurements
                    if (a, w, d) == (axis, m.width, m.depth)
                    and (m.quantity, m.step) == (found.quantity, 0 if kind == RMS else last)
                )
                axes.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    color=_COLOURS[found.quantity],
                    linestyle="-" if found.passed else ":",
                    label=f"{found.quantity}: slope {found.slope:+.2f}"
                    + ("" if found.passed else " FAILS"),
                )
                axes.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
            axes.minorticks_off()
            axes.set_title(_TITLES[kind].format(last), loc="left", fontsize=12)
            axes.set_xlabel("width" if axis == WIDTH else "layers")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=9)
    verdict = "passes" if check.passed else "fails"
    figure.suptitle(
        f"Coordinate check {verdict}: slopes of log RMS up to {check.limit:g} pass",
        x=0.012,
        ha="left",
        fontweight="bold",
    )
    save(figure, out / PNG)


def text(check: CoordinateCheck) -> str:
    """The text with one line for each slope, and the verdict."""
    lines = [
        f"{s.axis:<6} {s.kind:<7} {s.quantity:<10} slope {s.slope:+.3f}  "
        + ("ok" if s.passed else f"FAILS (limit {check.limit:g})")
        for s in check.slopes
    ]
    failed = sum(not s.passed for s in check.slopes)
    verdict = f"failed: {failed} of {len(check.slopes)} slopes" if failed else "passed"
    return "\n".join([*lines, f"coordinate check {verdict} (trained on {check.tokens})"])
