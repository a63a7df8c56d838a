"""Pictures of what happens after τ, and of where τ is best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from megatron_progressive.compare.arms import Comparison
from megatron_progressive.compare.drawing import (
    FAINT,
    GROWN_COLOURS,
    INK,
    SHORT_COLOURS,
    count_tick,
    dress,
    label_ends,
    new_figure,
    save,
)
from megatron_progressive.compare.gaps import MIXED_PERCENT, gap_curve, gap_percent
from megatron_progressive.grid.cells import FIXED, SCRATCH, TAU
from megatron_progressive.grid.labels import arm_words, families
from megatron_progressive.grid.report.figures import MANY, Look
from megatron_progressive.grid.report.laws import usable
from megatron_progressive.grid.results import Result, sizes_of

_COLUMNS = 2
_SIZE_COLOURS = (*GROWN_COLOURS, *SHORT_COLOURS)
_Setting = tuple[tuple[str, str], ...]  # of cells: what a run shares with its fixed-size run
_LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def mixing(
    results: Sequence[Result], compared: dict[str, Comparison], styles: dict[str, Look],
    title: str, path: Path,
) -> bool:  # fmt: skip
    """Draw the gap to fixed-size against tokens after the last expansion, with one panel for each
    size (and arm, where there are many families); False where there is no fixed-size run to compare
    with."""
    many = len({result.family for result in results}) > MANY
    curves: dict[tuple[str, str], list[_Curve]] = {}
    for result in results:
        comparison = compared.get(result.cell.name)
        if comparison is None or comparison.fixed is None:
            continue
        run = comparison.progressive
        steps, gap = gap_curve(run, comparison.fixed)
        tau = run.config.expansion_steps()[-1]
        kept = (steps > tau) & np.isfinite(gap)
        if kept.any():
            arm = arm_words(result.cell.arm) if many else ""
            label = result.family.removeprefix(arm).strip() or result.family
            tokens = (steps[kept] - tau) * run.step_tokens
            curve = _Curve(result.family, label, tokens, gap[kept], run.unit)
            curves.setdefault((result.cell.size, arm), []).append(curve)
    if not curves:
        return False
    sizes = list(sizes_of(results))
    panels = sorted(curves, key=lambda panel: sizes.index(panel[0]))
    rows = -(-len(panels) // _COLUMNS)
    figure = new_figure(title, 1 + 3.9 * rows, w_pad=0.12, h_pad=0.12)
    grid = figure.subplots(rows, min(_COLUMNS, len(panels)), squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    shown = np.concatenate([curve.gap for found in curves.values() for curve in found])
    limits = (1.4 * min(shown.min(), -2 * MIXED_PERCENT), 1.5 * max(shown.max(), 2 * MIXED_PERCENT))
    for axes, panel in zip(grid.flat, panels, strict=False):
        axes.set_ylim(*limits)
        _mixing_panel(axes, " ".join(panel).strip(), curves[panel], styles, many)
    save(figure, path)
    return True


@dataclass(frozen=True)
class _Curve:
    family: str
    label: str
    tokens: np.ndarray
    """The tokens after the last expansion."""
    gap: np.ndarray
    """The gap to fixed-size, in %."""
    unit: str
    """What ``tokens`` counts."""


def _mixing_panel(
    axes: Axes, title: str, curves: Sequence[_Curve], styles: dict[str, Look], many: bool
) -> None:
    labels: list[tuple[float, float, str, str]] = []
    limits = axes.get_ylim()
    names = list(dict.fromkeys(curve.family for curve in curves))
    for curve in curves:
        look, tokens, gap = styles[curve.family], curve.tokens, curve.gap
        # a panel of one arm tells its families apart itself
        number = names.index(curve.family) % len(_SIZE_COLOURS)
        colour = _SIZE_COLOURS[number] if many else look.colour
        first = curve is next(one for one in curves if one.family == curve.family)
        axes.plot(tokens, gap, color=colour, linewidth=1.8, marker=look.marker, markersize=3)
        if first:  # further seeds have the same colour
            labels.append((tokens[-1], gap[-1], f"{curve.label} {gap[-1]:+.2f} %", colour))
    axes.axhspan(-MIXED_PERCENT, MIXED_PERCENT, color=FAINT, alpha=0.6, linewidth=0)
    last = max(float(curve.tokens[-1]) for curve in curves)
    axes.plot([0, last], [0, 0], color=INK, linewidth=1.2)  # not behind the labels
    dress(axes, f"{title}: loss above fixed-size at the same step, %", f"{curves[0].unit} after τ")
    axes.set_yscale("symlog", linthresh=2 * MIXED_PERCENT, linscale=0.7)
    axes.set_ylim(*limits)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    room = 0.021 * max(len(text) for _, _, text, _ in labels)
    axes.set_xlim(0, (1 + room) * last)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
    axes.xaxis.set_major_formatter(FuncFormatter(count_tick))
    label_ends(axes, labels)


def tau_sweep(results: Sequence[Result], title: str, path: Path) -> bool:
    """Draw final loss and gap to fixed-size against τ, with a line for each size and family apart
    from τ (seeds averaged); False where fewer than two τ of any line are finished."""
    names = families([result.cell for result in results], without=[TAU])
    fixed: dict[tuple[str, _Setting], list[float]] = {}
    points: dict[tuple[str, str, _Setting], dict[float, list[float]]] = {}
    for result in usable(results):
        cell, loss = result.cell, result.loss or 0.0
        if cell.arm == FIXED:
            fixed.setdefault((cell.size, cell.setting), []).append(loss)
        elif cell.tau and cell.arm not in SCRATCH:
            tau = cell.config.expansion_steps()[-1] / cell.config.train.steps
            key = (cell.size, names[cell.name], cell.setting)
            points.setdefault(key, {}).setdefault(tau, []).append(loss)
    points = {key: found for key, found in points.items() if len(found) > 1}
    if not points:
        return False
    sizes = [size for size in sizes_of(results) if any(key[0] == size for key in points)]
    kinds = list(dict.fromkeys(key[1] for key in points))
    figure = new_figure(title, 6.4, w_pad=0.12)
    loss_axes, gap_axes = figure.subplots(1, 2)
    for axes, relative in ((loss_axes, False), (gap_axes, True)):
        labels = []
        for key, found in points.items():
            known = fixed.get((key[0], key[2]))
            if relative and known is None:
                continue
            taus = sorted(found)
            y = [float(np.mean(found[tau])) for tau in taus]
            if relative and known is not None:
                y = [gap_percent(value, float(np.mean(known))) for value in y]
            colour = _SIZE_COLOURS[sizes.index(key[0]) % len(_SIZE_COLOURS)]
            style = _LINES[kinds.index(key[1]) % len(_LINES)]
            axes.plot(taus, y, color=colour, linestyle=style, linewidth=2, marker="o", markersize=5)
            label = f"{key[0]} {key[1]}" if len(kinds) > 1 else key[0]
            labels.append((taus[-1], y[-1], label, colour))
        room = 0.019 * max((len(text) for _, _, text, _ in labels), default=0)
        every = [tau for found in points.values() for tau in found]
        low, high = min(every), max(every)
        axes.set_xlim(low - 0.05 * (high - low), high + (high - low) * room / (1 - min(0.6, room)))
        axes.set_xticks(sorted(set(every)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        if relative:
            axes.axhspan(-MIXED_PERCENT, MIXED_PERCENT, color=FAINT, alpha=0.6, linewidth=0)
            axes.axhline(0, color=INK, linewidth=1.2)
        what = "Final loss above fixed-size, %" if relative else "Final validation loss"
        dress(axes, what, "τ, share of the steps")
        label_ends(axes, labels)
    save(figure, path)
    return True
