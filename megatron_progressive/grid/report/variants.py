"""What the variants of the expansion in a study do, as a table: initialisation, order, side,
optimizer state and schedule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_progressive.compare.gaps import gap_percent
from megatron_progressive.config import ScheduleSection
from megatron_progressive.grid.cells import AROUND, FIXED, SCRATCH, Cell
from megatron_progressive.grid.labels import arm_words
from megatron_progressive.grid.report.laws import usable
from megatron_progressive.grid.results import Result, sizes_of

HEAD = ("run that grows", "τ", "init", "order", "new layers", "optimizer state", "re-warm",
        "schedule")  # fmt: skip
_Key = tuple[str, ...]


def ablation(results: Sequence[Result]) -> tuple[list[str], list[list[str]]] | None:
    """The head and the rows of the table: the final loss (seeds averaged) and its gap to fixed-size
    at each size, for arms whose expansion or schedule the grid varies. None where it varies
    neither."""
    grown = [r for r in results if r.cell.arm not in SCRATCH]
    keys = {result.cell.name: _key(result) for result in grown}
    variants: dict[_Key, set[_Key]] = {}
    for result in grown:
        variants.setdefault(_sweep(result), set()).add(keys[result.cell.name])
    chosen = [r for r in grown if len(variants[_sweep(r)]) > 1]
    if not chosen:
        return None
    done = usable(results)
    sizes = list(sizes_of(chosen))
    rows = []
    for key in sorted({keys[result.cell.name] for result in chosen}):
        cells = list(key)
        for size in sizes:
            mine = [r for r in done if keys.get(r.cell.name) == key and r.cell.size == size]
            cells.append(_cell(mine, done, size))
        rows.append(cells)
    return [*HEAD, *sizes], rows


def _sweep(result: Result) -> _Key:
    """What variants have in common; τ is an axis of its own. Of gradual stacking, which has none,
    the lengths of the stages are variants."""
    return result.cell.size, _arm(result.cell), result.cell.tau


def _key(result: Result) -> _Key:
    config = result.cell.config
    last = config.expansion[-1]
    taus = "+".join(f"{step / config.train.steps:.3g}" for step in config.expansion_steps())
    copied = last.init != "random"
    return (
        _arm(result.cell), result.cell.tau or taus, last.init,
        last.order if copied else "–", last.insert + f" {last.block}" * (last.block is not None),
        last.optimizer_state, _rewarm(config.schedule), config.schedule.name,
    )  # fmt: skip


def _rewarm(schedule: ScheduleSection) -> str:
    """How the learning rate climbs after τ; ``–`` where it does not."""
    if not schedule.rewarm:
        return "–"
    start = schedule.rewarm_from or 0.0
    return f"{schedule.rewarm:g} from {start:g}, {schedule.rewarm_layers or 'all'} layers"


def _arm(cell: Cell) -> str:
    """The arm's name, with the multiple of the crossing at which it grows, if it does."""
    around = cell.axes.get(AROUND)
    return arm_words(cell.arm) + (f" at {around}x" if around else "")


def _cell(mine: Sequence[Result], done: Sequence[Result], size: str) -> str:
    if not mine:
        return "–"
    loss = float(np.mean([r.loss or 0 for r in mine]))
    fixed = [
        r.loss or 0
        for r in done
        if (r.cell.arm, r.cell.size, r.cell.setting) == (FIXED, size, mine[0].cell.setting)
    ]
    if not fixed:
        return f"{loss:.4f}"
    return f"{loss:.4f} ({gap_percent(loss, float(np.mean(fixed))):+.2f} %)"
