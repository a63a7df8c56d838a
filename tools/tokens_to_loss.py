"""How many tokens one optimizer needs to another's final validation loss.

    python tools/tokens_to_loss.py OUT.png RUN …

Of finished fixed-size runs that differ in optimizer and learning rate (the cells of
``configs/grids/optimizer_tiny.yaml``) each optimizer's best learning rate is taken, by final
validation loss. Printed are all final losses, and for the best runs of each pair the tokens at
which one first reaches the other's final loss (linear between validations) over the other's
tokens; below 1 where it needs fewer. The run that reaches it has a schedule for its own full
length: one that is planned for fewer tokens would reach it earlier.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from itertools import permutations
from pathlib import Path

import numpy as np

from megatron_progressive.compare.drawing import (
    FIXED_COLOURS,
    GROWN_COLOURS,
    SHORT_COLOURS,
    count_tick,
    dress,
    new_figure,
    save,
)
from megatron_progressive.config import ConfigError
from megatron_progressive.runs.reading import Run, read_run

NAMES = {"adamw": "AdamW", "muon_nsgd": "Muon-NSGD"}
COLOURS = (GROWN_COLOURS[0], SHORT_COLOURS[0], *FIXED_COLOURS)


def final_loss(run: Run) -> float:
    """The validation loss of the last step, in nats per token."""
    return float(run.evals["loss"][-1])


def first_reached(tokens: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    """The tokens at which a curve first reaches a loss; None where it does not.

    Args:
        tokens, losses: the tokens and losses of the validations, float [validations].
    """
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return None
    at = int(below[0])
    if at == 0:
        return float(tokens[0])
    share = (losses[at - 1] - target) / (losses[at - 1] - losses[at])
    return float(tokens[at - 1] + share * (tokens[at] - tokens[at - 1]))


def best_runs(runs: list[Run]) -> dict[str, Run]:
    """The run of each optimizer with the lowest final loss."""
    by_name: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_name[run.config.optim.name].append(run)
    return {name: min(found, key=final_loss) for name, found in sorted(by_name.items())}


def sentences(best: dict[str, Run]) -> list[str]:
    lines = []
    for one, other in permutations(best, 2):
        evals, target = best[one].evals, final_loss(best[other])
        reached = first_reached(evals["tokens"], evals["loss"], target)
        total = float(best[other].evals["tokens"][-1])
        lines.append(
            f"{NAMES[one]} does not reach {NAMES[other]}'s {target:.4f}"
            if reached is None
            else f"{NAMES[one]} reaches {NAMES[other]}'s {target:.4f} with {reached / total:.3f} "
            f"of its tokens ({count_tick(round(reached, -3))} of {count_tick(round(total, -3))})"
        )
    return lines


def draw(runs: list[Run], best: dict[str, Run], title: str, path: Path) -> None:
    figure = new_figure(title, 5.2, w_pad=0.15)
    rates, curves = figure.subplots(1, 2)
    dress(rates, "Final validation loss, nats per token", "learning rate")
    dress(curves, "Validation loss of the best runs", "tokens")
    ticks: set[float] = set()
    for (name, run), colour in zip(best.items(), COLOURS, strict=False):
        swept = sorted((r.config.optim.lr, final_loss(r)) for r in runs
                       if r.config.optim.name == name)  # fmt: skip
        rates.plot(*zip(*swept, strict=True), "o-", color=colour, linewidth=2, label=NAMES[name])
        ticks |= {rate for rate, _ in swept}
        curves.plot(run.evals["tokens"], run.evals["loss"], color=colour, linewidth=2,
                    label=f"{NAMES[name]}, lr {run.config.optim.lr:g}")  # fmt: skip
    rates.set_xscale("log")
    rates.minorticks_off()
    rates.set_xticks(sorted(ticks), [f"{rate:g}" for rate in sorted(ticks)], rotation=45)
    low = min(final_loss(run) for run in best.values())
    rates.set_ylim(low - 0.1, low + 0.9)  # a diverged run's line leaves the picture
    curves.set_ylim(low - 0.1, low + 1.5)
    curves.xaxis.set_major_formatter(count_tick)
    rates.legend(frameon=False)
    curves.legend(frameon=False)
    save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    args = parser.parse_args()
    try:
        runs = [read_run(folder) for folder in args.runs]
        unfinished = [run.name for run in runs if not run.finished]
        if unfinished:
            raise ConfigError(f"RUN: got {', '.join(unfinished)}; accepted: finished runs")
        best = best_runs(runs)
        if len(best) < 2:
            raise ConfigError(f"RUN: got {', '.join(best)} alone; accepted: two optimizers or more")
    except ConfigError as error:
        print(f"tokens_to_loss: {error}", file=sys.stderr)
        return 2
    for run in sorted(runs, key=lambda r: (r.config.optim.name, r.config.optim.lr)):
        mark = " best" if run in best.values() else ""
        print(
            f"{run.config.optim.name:10} lr {run.config.optim.lr:<7g} {final_loss(run):.4f}{mark}"
        )
    lines = sentences(best)
    print(*lines, sep="\n")
    draw(runs, best, lines[-1], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
