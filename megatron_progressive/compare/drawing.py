"""What all pictures share: colours, labels and axes. Every line carries its own label; the colours
are Okabe and Ito's (jfly.uni-koeln.de/color), which colour-blind readers can tell apart."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter

from megatron_progressive.runtime.files import writing

GROWN_COLOURS = ("#0072B2", "#CC79A7", "#009E73", "#56B4E9")
"""The colours of runs that grow."""
FIXED_COLOURS = ("#333333", "#777777")
SHORT_COLOURS = ("#D55E00", "#E69F00")
NEVER_COLOURS = ("#882255", "#999933")
"""The colours of sources that never grow: two of Tol's (personal.sron.nl/~pault), beside Okabe and
Ito's."""
OTHER_COLOUR = "#999999"
INK, FAINT = "#222222", "#D9D9D9"
TEXT = {"fontsize": 11, "color": INK}
DPI = 130


def new_figure(title: str, height: float, width: float = 13, **pads: float) -> Figure:
    """An empty picture under its headline. Sizes are in inches, and so are ``w_pad`` and
    ``h_pad``."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    if pads:
        figure.get_layout_engine().set(**pads)  # type: ignore[union-attr, call-arg]
    headline(figure, title)
    return figure


def headline(figure: Figure, title: str) -> None:
    """Write the finding above the picture."""
    text = textwrap.fill(title.replace(" %", "\N{NO-BREAK SPACE}%"), 100)
    figure.suptitle(text, x=0.012, ha="left", fontsize=14.5, fontweight="bold", color=INK)


def dress(axes: Axes, title: str, xlabel: str) -> None:
    """Give axes a title above, a label below, and no more lines than needed."""
    axes.set_title(title, loc="left", fontsize=12.5, color=INK, pad=10)
    axes.set_xlabel(xlabel, **TEXT)  # type: ignore[arg-type]
    axes.tick_params(labelsize=10, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def count_tick(value: float, _: Any = None) -> str:
    """The text of a tick, as ``2k``, ``1.5M`` or ``3B``."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


def step_axis(axes: Axes, last: float, room: float) -> None:
    """An axis of steps from 0 to ``last``, with ``room`` times that for labels."""
    axes.set_xlim(0, (1 + room) * last)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
    axes.xaxis.set_major_formatter(FuncFormatter(count_tick))


def label_ends(
    axes: Axes, labels: list[tuple[float, float, str, str]], inside: bool = False
) -> None:
    """Write each label (x, y, text, colour) to the right of its line's end, and push labels apart
    where two would overlap.

    With ``inside``, a line that ends before others has its label to the left, where a falling line
    leaves the space below it free; on the right the label would hide the longer lines.
    """
    size, gap = 10.5, 15.0  # points: text, and the least distance of two baselines
    figure = axes.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]
    to_points = 72 / figure.dpi
    farthest = max((label[0] for label in labels), default=0.0)
    placed: list[_Placed] = []
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        px, py = axes.transData.transform((x, y)) * to_points
        width, wanted = 0.62 * size * len(text), py
        leftward = inside and x < 0.8 * farthest
        span = (px - width, px) if leftward else (px, px + width)
        for other in sorted(placed, key=lambda one: one.at):
            if other.meets(span) and abs(wanted - other.at) < gap:
                wanted = other.at + gap
        placed.append(_Placed(span, wanted, py, (x, y), text, colour, leftward))
    top = axes.bbox.y1 * to_points
    lowered: list[_Placed] = []
    for one in sorted(placed, key=lambda one: -one.at):  # what was pushed out comes down again
        ceiling = min([top, *(other.at - gap for other in lowered if other.meets(one.span))])
        lowered.append(replace(one, at=min(one.at, ceiling)))
    for one in lowered:
        axes.annotate(
            one.text, one.point, xytext=(-8 if one.leftward else 8, one.at - one.end),
            textcoords="offset points", va="center", ha="right" if one.leftward else "left",
            fontsize=size, color=one.colour, fontweight="bold", annotation_clip=False,
            path_effects=[withStroke(linewidth=3, foreground="w")],
        )  # fmt: skip


@dataclass(frozen=True)
class _Placed:
    """A label and its place, in points of the figure from the lower left corner."""

    span: tuple[float, float]
    at: float
    end: float
    """The height of the end of its line."""
    point: tuple[float, float]
    text: str
    colour: str
    leftward: bool

    def meets(self, span: tuple[float, float]) -> bool:
        return span[0] < self.span[1] and self.span[0] < span[1]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(f"writing {path}"):
        try:
            figure.savefig(temporary, format="png")
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, path)
