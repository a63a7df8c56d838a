"""The picture of crossings: loss of both depths against FLOPs, and what differs at equal FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from megatron_progressive.compare.drawing import (
    FAINT,
    GROWN_COLOURS,
    INK,
    NEVER_COLOURS,
    SHORT_COLOURS,
    dress,
    label_ends,
    new_figure,
    save,
)
from megatron_progressive.grid.report.crossings import Around, Pair, Study
from megatron_progressive.grid.report.figures import MARKERS
from megatron_progressive.runtime.text import flops_text

_SHALLOW, _DEEP = NEVER_COLOURS[0], SHORT_COLOURS[0]
_POINTS = 80
_Labels = list[tuple[float, float, str, str]]


def crossings(found: Sequence[Study], title: str, per: str, path: Path) -> bool:
    """Draw two panels for each size: the loss of both depths and of what grows against FLOPs, and
    the same above the deep one of equal FLOPs. False where no pair of depths is finished.

    Args:
        per: what losses are in nats of.
    """
    found = [study for study in found if study.pairs]
    if not found:
        return False
    figure = new_figure(title, 1 + 5.2 * len(found), w_pad=0.12, h_pad=0.12)
    rows = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), study in zip(rows, found, strict=True):
        for axes in (left, right):
            _axis(axes, study)
        _losses(left, study, per)
        _differences(right, study)
    save(figure, path)
    return True


def _axis(axes: Axes, study: Study) -> None:
    """The axis of FLOPs, and the crossing with its interval."""
    flops = [pair.flops for pair in study.pairs] + [one.flops for one in study.around]
    low, high = min(flops), max(flops)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.3, high * (high / low) ** 0.55 * 1.3)
    ticks = sorted({float(f"{pair.flops:.2g}") for pair in study.pairs})
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2g}".replace("e+", "e")))
    crossing = study.crossing
    if crossing is None or crossing.compute.value is None:
        return
    ends = (crossing.compute.low or crossing.budgets[0], crossing.compute.high or
            crossing.budgets[1])  # fmt: skip
    axes.axvspan(*ends, color=FAINT, alpha=0.6, linewidth=0)
    axes.axvline(crossing.compute.value, color=INK, linewidth=1.2, linestyle=(0, (5, 2)))
    axes.text(
        crossing.compute.value, 0.985, f"  crossing {flops_text(crossing.compute.value)}",
        transform=axes.get_xaxis_transform(), va="top", fontsize=10, color=INK,
    )  # fmt: skip


def _mean(pairs: Sequence[Pair], deep: bool) -> tuple[np.ndarray, np.ndarray]:
    """The mean loss of a depth at each budget."""
    budgets: dict[str, list[Pair]] = {}
    for pair in pairs:
        budgets.setdefault(pair.budget, []).append(pair)
    points = sorted(
        (
            float(np.mean([p.flops for p in same])),
            float(np.mean([p.deep if deep else p.shallow for p in same])),
        )
        for same in budgets.values()
    )
    x, y = zip(*points, strict=True)
    return np.array(x), np.array(y)


def _losses(axes: Axes, study: Study, per: str) -> None:
    labels: _Labels = []
    for deep, colour, layers, marker in (
        (False, _SHALLOW, study.source, "^"), (True, _DEEP, study.target, "s"),
    ):  # fmt: skip
        x, y = _mean(study.pairs, deep)
        axes.plot(x, y, color=colour, linewidth=2)
        for pair in study.pairs:
            loss = pair.deep if deep else pair.shallow
            axes.plot(pair.flops, loss, marker, color=colour, markersize=6, markeredgecolor="w")
        labels.append((x[-1], y[-1], f"{layers} layers alone", colour))
    for family, colour, marker, points in _grown(study):
        x = np.array([one.flops for one in points])
        y = np.array([float(np.mean(one.losses)) for one in points])
        axes.plot(x, y, color=colour, linewidth=1, alpha=0.5)
        axes.plot(x, y, marker, color=colour, markersize=8, markeredgecolor="w")
        labels.append((x[-1], y[-1], family, colour))
    dress(axes, f"{study.size}: final validation loss, nats per {per}", "training FLOPs")
    label_ends(axes, labels)


def _differences(axes: Axes, study: Study) -> None:
    """Percent above the deep model of equal FLOPs: of a pair of depths alone the other one, of what
    grows the short control."""
    labels: _Labels = []
    x, deep = _mean(study.pairs, deep=True)
    for pair in study.pairs:
        gap = 100 * (pair.shallow / pair.deep - 1)
        axes.plot(pair.flops, gap, "^", color=_SHALLOW, markersize=6, markeredgecolor="w")
    if study.crossing is not None:
        line = np.geomspace(x[0], x[-1], _POINTS)
        below = np.exp(np.interp(np.log(line), np.log(x), np.log(deep)))
        fitted = 100 * study.crossing.difference(line) / below
        axes.plot(line, fitted, color=_SHALLOW, linewidth=2)
        labels.append((line[-1], fitted[-1], f"{study.source} layers alone", _SHALLOW))
    axes.plot(x, 0 * x, color=_DEEP, linewidth=2)
    labels.append((x[-1], 0, f"{study.target} layers alone", _DEEP))
    for family, colour, marker, points in _grown(study):
        known = [
            (one.flops, one.controls[0].mean, one.controls[0])
            for one in points
            if one.controls[0].mean is not None
        ]
        if not known:
            continue
        for flops, mean, control in known:
            if control.low is not None and control.high is not None:
                axes.plot([flops] * 2, [control.low, control.high], color=colour, alpha=0.7)
            axes.plot(flops, mean, marker, color=colour, markersize=8, markeredgecolor="w")
        gaps = [mean for _, mean, _ in known]
        axes.plot([flops for flops, _, _ in known], gaps, color=colour, linewidth=1, alpha=0.5)
        labels.append((known[-1][0], gaps[-1], f"{family} {gaps[-1]:+.2f} %", colour))
    title = f"{study.size}: loss above {study.target} layers of equal FLOPs, %"
    dress(axes, title, "training FLOPs")
    axes.text(
        0.99, 0.015, "growing pays below both lines\nbars: 95 % of the paired difference",
        transform=axes.transAxes, ha="right", va="bottom", fontsize=9.5, color="#666666",
    )  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.18 * (high - low), high + 0.1 * (high - low))
    label_ends(axes, labels)


def _grown(study: Study) -> list[tuple[str, str, str, list[Around]]]:
    """What grows, as lines over the multiples of the crossing: name, colour, marker, points."""
    lines: dict[str, list[Around]] = {}
    for one in study.around:
        lines.setdefault(one.line, []).append(one)
    return [
        (name, GROWN_COLOURS[i % len(GROWN_COLOURS)], MARKERS[i // len(GROWN_COLOURS) % 6], points)
        for i, (name, points) in enumerate(lines.items())
    ]
