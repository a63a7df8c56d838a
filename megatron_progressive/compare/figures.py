"""The pictures of a report of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from megatron_progressive.compare.arms import (
    FIXED,
    NEVER,
    OTHER,
    PROGRESSIVE,
    SHORT,
    Comparison,
)
from megatron_progressive.compare.data_words import per_unit
from megatron_progressive.compare.drawing import (
    FAINT,
    FIXED_COLOURS,
    GROWN_COLOURS,
    INK,
    NEVER_COLOURS,
    OTHER_COLOUR,
    SHORT_COLOURS,
    TEXT,
    dress,
    label_ends,
    new_figure,
    save,
    step_axis,
)
from megatron_progressive.compare.gaps import MIXED_PERCENT, gap_curve
from megatron_progressive.compare.mixing import MixingTime, averaged, train_gap
from megatron_progressive.runs.reading import Run
from megatron_progressive.runtime.text import time_text

_PALETTE = {
    PROGRESSIVE: GROWN_COLOURS,
    FIXED: FIXED_COLOURS,
    SHORT: SHORT_COLOURS,
    NEVER: NEVER_COLOURS,
    OTHER: (OTHER_COLOUR,),
}
_POINTS = 2000  # of a drawn line: more cannot be seen
_SMOOTHING = 0.01  # share of a run's steps that the smoothed training loss averages over


@dataclass(frozen=True)
class Line:
    """A run as it is drawn."""

    run: Run
    arm: str
    label: str
    colour: str


def lines_of(runs: Sequence[tuple[Run, str]]) -> list[Line]:
    """A colour and a label for each (run, arm). The label is the arm's name where only one run has
    that arm, and the run's name where several do (with its parent folder, should names repeat)."""
    names = [run.name for run, _ in runs]
    by_arm: dict[str, list[Run]] = {}
    for run, arm in runs:
        by_arm.setdefault(arm, []).append(run)
    found = []
    for run, arm in runs:
        same, colours = by_arm[arm], _PALETTE[arm]
        alone = len(same) == 1 and arm != OTHER
        colour = colours[same.index(run) % len(colours)]
        name = run.name if names.count(run.name) == 1 else f"{run.folder.parent.name}/{run.name}"
        found.append(Line(run, arm, arm if alone else name, colour))
    return found


def smoothed(run: Run) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Indices of train steps and the training loss averaged exponentially over 1 % of them.

    The average starts anew after each expansion, so that it does not smear the spike, and its bias
    at the start is corrected (Kingma and Ba 2015, section 3).
    """
    loss = run.train["loss"]
    window = max(1.0, _SMOOTHING * run.config.train.steps)
    keep = 1 - 1 / window
    restarts = {tau + 1 for tau in run.config.expansion_steps()}
    out, total, weight = np.empty_like(loss), 0.0, 0.0
    for i, (step, value) in enumerate(zip(run.train["step"], loss, strict=True)):
        if step in restarts:
            total = weight = 0.0
        if np.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out[i] = total / weight if weight else np.nan
    shown = np.unique(np.linspace(0, len(loss) - 1, min(len(loss), _POINTS)).astype(int))
    return shown, out[shown]


def overview(lines: Sequence[Line], title: str, path: Path) -> None:
    """Draw loss against FLOPs and steps, learning rate, and wall time, as one PNG."""
    figure = new_figure(title, 9.4, w_pad=0.12, h_pad=0.12)
    axes = figure.subplots(2, 2, gridspec_kw={"height_ratios": [1.6, 1]})
    limits = _loss_limits(lines)
    _loss(axes[0, 0], lines, "flops", limits)
    _loss(axes[0, 1], lines, "step", limits)
    _learning_rate(axes[1, 0], lines)
    _wall(axes[1, 1], lines)
    save(figure, path)


def gaps(comparisons: Sequence[Comparison], lines: Sequence[Line], title: str, path: Path) -> bool:
    """Draw the validation loss relative to fixed-size at the same step; False where there is
    none."""
    pairs = [(c.progressive, c.fixed) for c in comparisons if c.fixed is not None]
    drawn = [(run, *gap_curve(run, fixed)) for run, fixed in pairs]
    drawn = [(run, steps, gap) for run, steps, gap in drawn if len(steps) > 1]
    if not drawn:
        return False
    figure = new_figure(title, 5)
    axes = figure.subplots()
    line_of = {line.run.folder: line for line in lines}
    labels = []
    for run, steps, gap in drawn:
        line = line_of[run.folder]
        axes.plot(steps, gap, color=line.colour, linewidth=2, marker="o", markersize=3)
        labels.append((steps[-1], gap[-1], f"{line.label} {gap[-1]:+.2f} %", line.colour))
    axes.axhspan(-MIXED_PERCENT, MIXED_PERCENT, color=FAINT, alpha=0.6, linewidth=0)
    axes.axhline(0, color=_PALETTE[FIXED][0], linewidth=1.5)
    dress(axes, "Validation loss above fixed-size at the same step, %", "step")
    # before τ the shallow model is far above: a symmetric log scale keeps the end readable
    axes.set_yscale("symlog", linthresh=2 * MIXED_PERCENT, linscale=0.7)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    values = np.concatenate([gap[np.isfinite(gap)] for _, _, gap in drawn])
    low, high = min(values.min(), -2 * MIXED_PERCENT), max(values.max(), 2 * MIXED_PERCENT)
    axes.set_ylim(1.3 * low, 1.6 * high)
    room = max(len(text) for _, _, text, _ in labels)
    step_axis(axes, max(float(steps[-1]) for _, steps, _ in drawn), 0.009 * room)
    axes.text(0, 0, f" fixed-size, ± {MIXED_PERCENT} %", va="bottom", fontsize=10, color=INK)
    _mark_expansions(axes, [run for run, _, _ in drawn], "step")
    label_ends(axes, labels)
    save(figure, path)
    return True


def mixing_curve(found: MixingTime, run: Run, fixed: Run, title: str, path: Path) -> None:
    """Draw the gap of ``run`` to ``fixed`` after its last expansion, and where it closes, as a
    PNG."""
    figure = new_figure(title, 5, width=11)
    axes, colour = figure.subplots(), _PALETTE[PROGRESSIVE][0]
    per_step, threshold = found.tokens_per_step, found.threshold_percent
    steps, gap = train_gap(run, fixed)
    steps, gap = steps[steps > 0], averaged(gap[steps > 0], found.train.window_steps)
    axes.plot(per_step * steps, gap, color=colour, linewidth=1, alpha=0.5)
    steps, gap = gap_curve(run, fixed)
    steps, gap = per_step * (steps[steps > found.tau] - found.tau), gap[steps > found.tau]
    axes.plot(steps, gap, color=colour, linewidth=2, marker="o", markersize=4)
    axes.axhspan(-threshold, threshold, color=FAINT, alpha=0.6, linewidth=0)
    axes.axhline(0, color=_PALETTE[FIXED][0], linewidth=1.5)
    if found.low is not None and found.tokens is not None:
        high = found.steps_after if found.high is None else found.high
        axes.axvspan(per_step * found.low, per_step * high, color=colour, alpha=0.12, linewidth=0)
        axes.axvline(found.tokens, color=colour, linewidth=1, linestyle=":")
    dress(axes, "Loss above fixed-size at the same step, %", f"{found.unit} after the expansion")
    axes.set_yscale("symlog", linthresh=2 * threshold or 1.0, linscale=0.7)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    step_axis(axes, float(steps[-1]), 0.02)
    axes.text(
        0.99, 0.98, "dots: validation\nthin: training, averaged"
        f"\ngrey: fixed-size, ± {threshold:g} %"
        + "\nblue: where it mixed, 95 %" * (found.low is not None),
        transform=axes.transAxes, ha="right", va="top", fontsize=9.5, color="#666666",
    )  # fmt: skip
    save(figure, path)


def _loss_limits(lines: Sequence[Line]) -> tuple[float, float]:
    """The limits of the loss axis: from the lowest validation loss up to the highest after a
    twentieth of each run, including spikes up to a point. The common fall from the start would
    flatten the rest."""
    lows, highs = [], []
    for line in lines:
        loss, step = line.run.evals["loss"], line.run.evals["step"]
        late = loss[(step > 0.05 * line.run.config.train.steps) & np.isfinite(loss)]
        if len(late):
            lows.append(late.min())
            highs.append(late.max())
    if not lows:
        return 0.0, 12.0
    low, high = min(lows), max(highs)
    spikes = [
        float(e["loss_after"]) for x in lines for e in x.run.expansions if e.get("loss_after")
    ]
    top = max([high, *(spike for spike in spikes if spike < high + (high - low))])
    margin = 0.06 * (top - low) or 0.1
    return low - margin, top + margin


def _loss(axes: Axes, lines: Sequence[Line], x: str, limits: tuple[float, float]) -> None:
    labels = []
    for line in lines:
        shown, loss = smoothed(line.run)
        axes.plot(line.run.train[x][shown], loss, color=line.colour, linewidth=1, alpha=0.35)
        evals = line.run.evals
        axes.plot(evals[x], evals["loss"], color=line.colour, linewidth=2.2)
        if len(evals):
            end = "" if line.run.finished else " (unfinished)"
            last = evals["loss"][-1]
            labels.append((evals[x][-1], last, f"{line.label} {last:.3f}{end}", line.colour))
            axes.plot(evals[x][-1], last, "o", color=line.colour, markersize=6)
    against = "training FLOPs (log scale)" if x == "flops" else "step"
    per = per_unit(line.run.unit for line in lines)
    dress(axes, f"Loss against {'FLOPs' if x == 'flops' else 'steps'}, nats per {per}", against)
    ends = [line.run.train[x][-1] for line in lines if len(line.run.train)]
    room = max((len(text) for _, _, text, _ in labels), default=0)  # characters right of the ends
    if x == "flops":
        axes.set_xscale("log")
        if ends:  # two decades of compute: what comes before is the fall from a uniform guess
            axes.set_xlim(max(ends) / 200, max(ends) * 10 ** (0.04 * room))
    else:
        step_axis(axes, max(ends, default=1.0), 0.025 * room)
    axes.set_ylim(*limits)
    if x == "step":  # right of the ends, above their labels
        axes.text(
            0.99, 0.98, "thick: validation\nthin: training, smoothed", transform=axes.transAxes,
            ha="right", va="top", fontsize=9.5, color="#666666",
        )  # fmt: skip
    _mark_expansions(axes, [line.run for line in lines], x)
    label_ends(axes, labels, inside=x == "flops")


def _mark_expansions(axes: Axes, runs: Sequence[Run], x: str) -> None:
    """Mark each τ with a dotted line and the depths; equal marks are drawn once."""
    marks: dict[float, str] = {}
    for run in runs:
        for event in run.expansions:
            step = event.get("step")
            at = np.flatnonzero(run.train["step"] == step)
            if not len(at):
                continue
            text = f"τ: {event.get('from_layers')} → {event.get('to_layers')} layers"
            marks.setdefault(float(run.train[x][at[0]]), text)
    for row, (position, text) in enumerate(sorted(marks.items())):
        axes.axvline(position, color=_PALETTE[PROGRESSIVE][0], linewidth=1, linestyle=":")
        axes.annotate(
            text, (position, 1), xycoords=("data", "axes fraction"),
            xytext=(-4, -4 - 14 * (row % 3)), textcoords="offset points", ha="right", va="top",
            fontsize=10, color=_PALETTE[PROGRESSIVE][0],
            path_effects=[withStroke(linewidth=3, foreground="w")],
        )  # fmt: skip


def _learning_rate(axes: Axes, lines: Sequence[Line]) -> None:
    # Schedules coincide where arms share steps: the progressive run's is drawn last, dashed.
    ordered = sorted(lines, key=lambda line: line.arm == PROGRESSIVE)
    for line in ordered:
        train = line.run.train
        shown = np.unique(np.linspace(0, len(train) - 1, min(len(train), _POINTS)).astype(int))
        dashed = line.arm == PROGRESSIVE
        axes.plot(
            train["step"][shown], train["lr"][shown], color=line.colour,
            linewidth=2 if dashed else 3, linestyle=(0, (4, 3)) if dashed else "-",
            label=line.label,
        )  # fmt: skip
    dress(axes, "Learning rate against steps", "step")
    peak = max((float(line.run.config.optim.lr) for line in lines), default=1.0)
    axes.set_ylim(0, 1.2 * peak or 1.0)
    longest = max((line.run.config.train.steps for line in lines), default=1)
    step_axis(axes, longest, 0.025 * (6 + max((len(line.label) for line in lines), default=0)))
    _mark_expansions(axes, [line.run for line in lines], "step")
    axes.legend(fontsize=10, frameon=False, loc="center right")


def _wall(axes: Axes, lines: Sequence[Line]) -> None:
    timed = [(line, wall) for line in lines if (wall := line.run.train_wall) is not None]
    dress(axes, "Training time, expansion pauses included", "")
    axes.grid(visible=False)
    if not timed:
        axes.text(0.5, 0.5, "no finished run", ha="center", transform=axes.transAxes, **TEXT)  # type: ignore[arg-type]
        axes.set_axis_off()
        return
    for row, (line, wall) in enumerate(reversed(timed)):
        axes.barh(row, wall, color=line.colour, height=0.6)
        axes.text(wall, row, f"  {time_text(wall)}", va="center", **TEXT)  # type: ignore[arg-type]
    axes.set_yticks(range(len(timed)), [line.label for line, _ in reversed(timed)])
    axes.tick_params(axis="y", labelsize=11, length=0)
    axes.set_xlim(0, 1.2 * max(wall for _, wall in timed))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
