"""Pictures of a study's laws: loss against FLOPs, the frontier, compute efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from megatron_progressive.compare.data_words import per_unit
from megatron_progressive.compare.drawing import (
    FAINT,
    FIXED_COLOURS,
    GROWN_COLOURS,
    INK,
    NEVER_COLOURS,
    SHORT_COLOURS,
    TEXT,
    count_tick,
    dress,
    label_ends,
    new_figure,
    save,
)
from megatron_progressive.grid.cells import ALONE, FIXED, NEVER, SHORT
from megatron_progressive.grid.labels import arm_words, is_control
from megatron_progressive.grid.report.laws import Law, Saving, frontier, usable
from megatron_progressive.grid.results import Result, of_families
from megatron_progressive.laws.fits import Fit, losses_of, rows_of

_PALETTES = {FIXED: FIXED_COLOURS, ALONE: FIXED_COLOURS, SHORT: SHORT_COLOURS, NEVER: NEVER_COLOURS}
_SHIFTS = {SHORT: 1, NEVER: 2}
MARKERS = ("o", "s", "^", "D", "v", "P")
MANY = 8
"""The number of families that one picture can tell apart."""
_TAIL = (0.025, 0.975)  # of the bootstrap samples: the band
_POINTS = 80
_FACTORS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)  # that an axis names
_WIDE = 0.5
"""The share of the picture's height from which the band of a law would only hide the others."""


@dataclass(frozen=True)
class Look:
    """How a family is drawn in every picture."""

    colour: str
    marker: str
    name: str
    """The name for which a picture has room: that of the family, or that of its arm where there are
    many families."""


def looks(results: Sequence[Result]) -> dict[str, Look]:
    """A colour for each family, and another marker where the colours have been used up. Where there
    are more families than can be told apart, each looks as its arm does."""
    members = of_families(results)
    many = len(members) > MANY
    counts: dict[tuple[str, ...], int] = {}
    known: dict[str, Look] = {}
    found = {}
    for family, cells in members.items():
        name = arm_words(cells[0].cell.arm) if many else family
        if name not in known:
            palette = _PALETTES.get(cells[0].cell.arm, GROWN_COLOURS)
            index = counts.get(palette, 0)
            counts[palette] = index + 1
            # controls differ from what they control in shape as well
            shift = _SHIFTS.get(cells[0].cell.arm, 0)
            marker = MARKERS[(index // len(palette) + shift) % len(MARKERS)]
            known[name] = Look(palette[index % len(palette)], marker, name)
        found[family] = known[name]
    return found


def laws(
    results: Sequence[Result],
    fitted: Sequence[Law],
    styles: dict[str, Look],
    title: str,
    path: Path,
) -> bool:
    """Draw the loss against total FLOPs of each family, with its law and the law's band; False
    where no cell is finished."""
    done = usable(results)
    if not done:
        return False
    figure = new_figure(title, 7.2)
    axes = figure.subplots()
    labels: list[tuple[float, float, str, str]] = []
    fits = {law.family: law.fit for law in fitted}
    losses = np.array([r.loss for r in done], dtype=float)
    margin = 0.12 * (losses.max() - losses.min()) or 0.1
    bottom, top = losses.min() - margin, losses.max() + margin
    bands = []
    for family, members in of_families(done).items():
        x, y = _points(members)
        look, fit = styles[family], fits.get(family)
        axes.plot(x, y, look.marker, color=look.colour, markersize=7, markeredgecolor="w")
        last = int(np.argmax(x))
        # of many controls one is named; they look alike
        end, text = (x[last], y[last]), look.name if is_control(family) else family
        if fit is not None:
            x_law, low, middle, high = _band(fit)
            bands.append(bool(np.median(high - low) < _WIDE * (top - bottom)))
            if bands[-1]:
                axes.fill_between(x_law, low, high, color=look.colour, alpha=0.13, linewidth=0)
            axes.plot(x_law, middle, color=look.colour, linewidth=2)
            end = (x_law[-1], middle[-1])
            if look.name == family and "alpha" not in fit.undetermined:
                text += f"  α = {fit.best[1]:.2f}"
        if text not in [label[2] for label in labels]:
            labels.append((*end, text, look.colour))
    per = per_unit(r.run.unit for r in done if r.run is not None)
    dress(axes, f"Final validation loss against total FLOPs, nats per {per}", "training FLOPs")
    _log_flops(axes, [r.flops or 0 for r in done], labels)
    axes.set_ylim(bottom, top)  # bands may leave the picture
    if bands:
        said = ["lines: L = E + A / C^α"]
        said += ["bands: 95 % of bootstrap samples"] * any(bands)
        said += [f"no band: higher than {100 * _WIDE:.0f} % of the picture"] * (not all(bands))
        axes.text(
            0.99, 0.98, "\n".join(said),
            transform=axes.transAxes, ha="right", va="top", fontsize=10, color="#666666",
        )  # fmt: skip
    label_ends(axes, labels)
    save(figure, path)
    return True


def _points(members: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([r.flops for r in members], dtype=float),
        np.array([r.loss for r in members], dtype=float),
    )


def _band(fit: Fit) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The FLOPs over the range of the cells, and for each the lower end of the band, the law and
    the upper end."""
    x = np.geomspace(fit.inputs[0][0], fit.inputs[0][1], _POINTS)
    rows = rows_of(fit)
    losses = np.array([losses_of(rows, np.array([one])) for one in x])
    low, high = np.quantile(losses[:, 1:], _TAIL, axis=1)
    return x, low, losses[:, 0], high


def _log_flops(
    axes: Axes, flops: Sequence[float], labels: Sequence[tuple[float, float, str, str]]
) -> None:
    """Give axes a logarithmic axis of FLOPs with room for the labels."""
    axes.set_xscale("log")
    low, high = min(flops), max(flops)
    decades = max(0.5, np.log10(high / low))
    # a character of a label takes 0.7 % of the picture's width
    share = min(0.45, 0.0078 * max((len(text) for _, _, text, _ in labels), default=0))
    span = (1.06 * decades) / (1 - share)
    left = low / 10 ** (0.08 * decades)
    axes.set_xlim(left, left * 10**span)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 2 else (1,)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+", "e"))
    )
    axes.xaxis.set_minor_formatter(NullFormatter())


def pareto(results: Sequence[Result], styles: dict[str, Look], title: str, path: Path) -> bool:
    """Draw all finished cells, and the frontier of those that no other one beats in FLOPs and
    loss."""
    done = usable(results)
    if not done:
        return False
    figure = new_figure(title, 7.2)
    axes = figure.subplots()
    best = frontier(results)
    x, y = _points(best)
    ends = 10 * max(r.flops or 0 for r in done)
    axes.step([*x, ends], [*y, y[-1]], where="post", color=FAINT, linewidth=6, zorder=1)
    by_look: dict[Look, list[Result]] = {}
    for result in done:
        by_look.setdefault(styles[result.family], []).append(result)
    for look, members in by_look.items():
        axes.plot(
            *_points(members), look.marker, color=look.colour, markersize=7, alpha=0.9,
            markeredgecolor="w", label=look.name,
        )  # fmt: skip
    for result in best:  # below the frontier there is nothing
        axes.annotate(
            result.cell.size, (result.flops or 0, result.loss or 0), xytext=(-7, -7),
            textcoords="offset points", ha="right", va="top", fontsize=10,
            color=styles[result.family].colour, fontweight="bold",
        )  # fmt: skip
    per = per_unit(r.run.unit for r in done if r.run is not None)
    dress(axes, f"Pareto frontier: loss against total FLOPs, nats per {per}", "training FLOPs")
    _log_flops(axes, [r.flops or 0 for r in done], [(0, 0, "n" * 10, "")])
    losses = np.array([r.loss for r in done], dtype=float)
    margin = 0.1 * (losses.max() - losses.min()) or 0.1
    axes.set_ylim(losses.min() - margin, losses.max() + margin)
    axes.legend(fontsize=10, frameon=False, loc="upper right")
    save(figure, path)
    return True


def efficiency(savings: Sequence[Saving], styles: dict[str, Look], title: str, path: Path) -> bool:
    """Draw compute-efficiency factors by the laws against size, one panel for each kind of
    reference; False where there are none."""
    savings = [saving for saving in savings if saving.efficiency is not None]
    panels = [
        ("fixed-size", [s for s in savings if not is_control(s.reference)]),
        ("its own short control", [s for s in savings if is_control(s.reference, SHORT)]),
        ("its source never grown", [s for s in savings if is_control(s.reference, NEVER)]),
    ]
    panels = [(name, found) for name, found in panels if found]
    if not panels:
        return False
    figure = new_figure(title, 6, w_pad=0.15)
    # shared: of the two panels' factors one is to be read against the other
    for axes, (name, found) in zip(
        np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, strict=True
    ):
        factors = [s.efficiency.factor.value for s in savings if s.efficiency is not None]
        values = [factor for factor in factors if factor]
        least, most = min([*values, 0.8]), max([*values, 1.2])
        limits = (0.45 * _on_axis(least), 2.2 * _on_axis(most))
        _efficiency_panel(axes, found, styles, limits, width=1 / len(panels))
        dress(axes, f"against {name}", "parameters at full depth")
    axes = figure.axes[0]
    axes.set_ylabel("FLOPs of the control over its own, at equal loss", **TEXT)  # type: ignore[arg-type]
    save(figure, path)
    return True


def factor_text(factor: float) -> str:
    """A compute-efficiency factor, as exactly as an axis shows it."""
    if factor < _FACTORS[0]:
        return f"<{_FACTORS[0]:g}x"
    return f">{_FACTORS[-1]:g}x" if factor > _FACTORS[-1] else f"{factor:.2f}x"


def _on_axis(factor: float) -> float:
    """A factor, or the end of the axis beyond which it lies: a law that hardly comes down to a loss
    gives any power of ten."""
    return min(max(factor, _FACTORS[0]), _FACTORS[-1])


def _efficiency_panel(
    axes: Axes, found: Sequence[Saving], styles: dict[str, Look], limits: tuple[float, float],
    width: float,
) -> None:  # fmt: skip
    """One panel, which has ``width`` of the picture."""
    labels, lines = [], list(dict.fromkeys((s.family, s.reference) for s in found))
    sizes = sorted({s.params for s in found})
    for number, (family, reference) in enumerate(lines):
        look = styles[family]
        # of several depths of one source each has its own line
        stage = reference.rpartition(", ")[2] if sum(one == family for one, _ in lines) > 1 else ""
        # beside each other, so that intervals can be told apart
        nudge = 1 + 0.02 * (number - (len(lines) - 1) / 2)
        x, y = [], []
        for saving in found:
            law = saving.efficiency
            if law is None or (saving.family, saving.reference) != (family, reference):
                continue
            factor, hollow = law.factor, law.extrapolated
            if not factor.value:
                continue
            x.append(saving.params * nudge)
            y.append(_on_axis(factor.value))
            last = factor_text(factor.value)
            low, high = factor.low or 1e-3, factor.high if factor.high is not None else 1e3
            axes.plot([x[-1]] * 2, [low, high], color=look.colour, linewidth=1.5, alpha=0.7)
            axes.plot(
                x[-1], y[-1], look.marker, color=look.colour, markersize=8,
                markerfacecolor="w" if hollow else look.colour,
            )  # fmt: skip
        axes.plot(x, y, color=look.colour, linewidth=1, alpha=0.5)
        if x:
            text = " ".join(filter(None, (family, stage, last)))
            labels.append((x[-1], y[-1], text, look.colour))
    axes.axhline(1, color=INK, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    room = min(0.65, 0.0085 / width * max((len(text) for _, _, text, _ in labels), default=0))
    decades = max(0.2, np.log10(sizes[-1] / sizes[0]))
    axes.set_xlim(
        sizes[0] / 10 ** (0.06 * decades), sizes[-1] * 10 ** (decades * room / (1 - room))
    )
    axes.set_xticks(sizes, [count_tick(float(f"{size:.3g}")) for size in sizes])
    axes.yaxis.set_major_locator(FixedLocator(_FACTORS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.minorticks_off()
    axes.text(
        0.01, 0.985, "above 1: growing is cheaper\nhollow: outside what was measured",
        transform=axes.transAxes, va="top", fontsize=9.5, color="#666666",
    )  # fmt: skip
    label_ends(axes, labels)
