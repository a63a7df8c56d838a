"""Draw ``docs/concepts.png``: the schedule, τ, and the runs that a growing run is compared with.

    python tools/docs/concepts_drawing.py

The learning rate is the project's own schedule and the FLOPs are its own count, of
``configs/demo.yaml``; no loss is drawn.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from megatron_progressive.config import RunConfig, load
from megatron_progressive.cost.flops import step_flops, total_flops
from megatron_progressive.models import model_shape
from megatron_progressive.optim.schedule import learning_rate
from megatron_progressive.plan.controls import fixed_size, never_grown, short_control

ROOT = Path(__file__).resolve().parents[2]
SHALLOW, DEEP, RATE = "#9ecae1", "#3182bd", "#636363"


def phases(config: RunConfig) -> list[tuple[int, int, int]]:
    """(first step, last step, layers) of each phase of a run."""
    borders = [0, *config.expansion_steps(), config.last_step]
    depths = [model_shape(config).num_layers, *(e.to_layers for e in config.expansion)]
    return [(borders[i], borders[i + 1], depth) for i, depth in enumerate(depths)]


def draw_schedule(axes: Axes, config: RunConfig) -> None:
    """The learning rate over the steps of the growing run, with τ."""
    steps = range(1, config.train.steps + 1)
    axes.plot(steps, [learning_rate(config, step) for step in steps], color=RATE)
    tau = config.expansion_steps()[0]
    axes.axvline(tau, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        "τ: the expansion", (tau, config.optim.lr * 0.5), (tau + 25, config.optim.lr * 0.5)
    )
    for start, what in ((0.0, "warmup"), (0.2, "stable"), (0.87, "decay")):
        axes.text(start * config.train.steps, config.optim.lr * 1.08, what, color=RATE)
    axes.set_ylim(0, config.optim.lr * 1.25)
    axes.set_ylabel("learning rate")
    axes.set_xlabel("step")


def draw_runs(axes: Axes, config: RunConfig) -> None:
    """A bar for each run: its width is its FLOPs, its height its depth."""
    runs = [
        ("fixed-size: full depth, equal steps", fixed_size(config)),
        ("growing: the run that is judged", config),
        ("short control: full depth, equal FLOPs", short_control(config)),
        ("never grown: source depth, equal FLOPs", never_grown(config)[0]),
    ]
    deepest = max(depth for _, run in runs for *_, depth in phases(run))
    for row, (name, run) in enumerate(reversed(runs)):
        left = 0.0
        for first, last, depth in phases(run):
            width = (last - first) * step_flops(model_shape(run, depth), run) / 1e12
            height = 0.16 + 0.44 * depth / deepest
            color = DEEP if depth == deepest else SHALLOW
            axes.barh(row, width, height, left=left, color=color, edgecolor="white")
            axes.text(left + width / 2, row, f"{depth}", ha="center", va="center", fontsize=8)
            left += width
        axes.text(0, row + 0.36, f"{name}, {run.train.steps:,} steps", fontsize=9)
    equal = total_flops(config) / 1e12
    axes.axvline(equal, color="black", linestyle=":", linewidth=1)
    axes.set_ylim(-0.5, len(runs) - 0.2)
    axes.set_yticks([])
    axes.set_xlabel("training FLOPs, 1e12 (numbers in the bars: layers)")


def main() -> None:
    """Write the picture."""
    config = load(ROOT / "configs" / "demo.yaml")
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 6), height_ratios=(1, 1.7), layout="constrained"
    )
    draw_schedule(above, config)
    draw_runs(below, config)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "concepts.png", dpi=110)


if __name__ == "__main__":
    main()
