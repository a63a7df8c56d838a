"""The crossing study of a grid: two depths of each size are trained alone at several budgets, and
what grows is spanned around the budget at which they cost the same for the same loss.

The crossing (:mod:`megatron_progressive.laws.crossing`) is found anew from the finished runs each
time that the grid is read: nothing but these decides it. Cells around it have their names before it
is known, and their steps and fingerprints after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError, check_value
from megatron_progressive.config.values import converted, shown
from megatron_progressive.cost.flops import step_flops
from megatron_progressive.grid.cell_runs import share_runs
from megatron_progressive.grid.cells import (
    BUDGET,
    FIXED,
    NEVER,
    PILOT,
    SCRATCH,
    SHORT,
    Cell,
    SizeCells,
    Span,
)
from megatron_progressive.laws.crossing import LEAST_BUDGETS, Crossing, distinct, find_crossing
from megatron_progressive.laws.fits import LEVEL
from megatron_progressive.models import model_shape
from megatron_progressive.plan.preflight import check_run, smallest_world
from megatron_progressive.runs.files import is_finished, read_summary
from megatron_progressive.runtime.text import flops_text

KEYS = ("source", "budgets", "around")
AROUND = (0.5, 1.0, 2.0)
WAITS = "waits for the crossing"


@dataclass(frozen=True)
class GridCrossing:
    """The two depths of one size and schedule, alone."""

    size: str
    schedule: str
    source: int
    """The layers of the shallow one."""
    target: int
    """Those of the deep one, which is the size's full depth."""
    budgets: list[float]
    """In FLOPs."""
    pairs: list[tuple[Cell, Cell]]
    """The shallow and the deep cell of each budget and seed."""

    @property
    def cells(self) -> list[Cell]:
        return [cell for pair in self.pairs for cell in pair]

    @property
    def assumed(self) -> float:
        """The FLOPs that stand for the crossing until it is known: the geometric mean of the
        budgets. They serve to price cells alone."""
        return math.exp(sum(map(math.log, self.budgets)) / len(self.budgets))

    def found(self) -> Crossing | None:
        """The crossing; None until every one of :attr:`cells` is finished."""
        losses = [[_final_loss(cell) for cell in pair] for pair in self.pairs]
        done = [(low, high) for low, high in losses if low is not None and high is not None]
        if len(done) < len(losses):
            return None
        shallow, deep = zip(*done, strict=True)
        flops = [(low.flops + high.flops) / 2 for low, high in self.pairs]
        return find_crossing(flops, shallow, deep)

    def span(self, factor: float, found: Crossing | None) -> Span:
        """The FLOPs of runs that grow at ``factor`` times the crossing."""
        at = None if found is None else found.compute.value
        unknown = WAITS if found is None else self.why_none(found)
        return Span(f"{factor:g}", factor * (at or self.assumed), unknown)

    def why_none(self, found: Crossing) -> str:
        """Why nothing is trained around a crossing; empty where there is one."""
        if found.compute.value is not None:
            return ""
        ends = " and ".join(flops_text(budget) for budget in found.budgets)
        depth = {"shallow": self.source, "deep": self.target}.get(found.lower)
        why = (
            f"noise hides which of {self.source} and {self.target} layers ends lower: more seeds, "
            f"or budgets further apart"
            if depth is None
            else f"{depth} layers end lower at all budgets"
        )
        return f"no crossing between {ends} FLOPs: {why}"

    def finding(self, found: Crossing | None) -> str:
        """What the cells say, in one line without the size's name."""
        if found is None:
            done = sum(_final_loss(cell) is not None for cell in self.cells)
            return f"{done} of {len(self.cells)} cells of depths alone are finished"
        if found.compute.value is None:
            return self.why_none(found)
        return (
            f"{self.source} and {self.target} layers cross at {flops_text(found.compute.value)} "
            f"FLOPs ({interval_text(found)}; {found.pairs} pairs)"
        )


def interval_text(found: Crossing) -> str:
    """The interval of a crossing; an end that is open lies beyond the budgets."""
    low, high, level = found.compute.low, found.compute.high, f"{100 * LEVEL:.0f} %"
    if low is None and high is None:
        return f"{level}: anywhere among the budgets, or beyond"
    if low is None:
        return f"{level}: up to {flops_text(high or 0)}, from below the budgets"
    if high is None:
        return f"{level}: from {flops_text(low)} to above the budgets"
    return f"{level}: {flops_text(low)} to {flops_text(high)}"


def _final_loss(cell: Cell) -> float | None:
    """The final validation loss of a finished cell."""
    summary, _ = read_summary(cell.folder)
    if summary is None or not is_finished(summary, cell.config.last_step):
        return None
    return float(summary["final_eval_loss"])


@dataclass(frozen=True)
class Asked:
    """A grid's ``crossing``, checked as far as it can be without its sizes."""

    source: int
    budgets: list[float]
    around: list[float]


def asked_of(values: dict[str, Any], arms: Sequence[str], taus: Sequence[Any]) -> Asked:
    """What a grid asks for.

    Args:
        values: the grid's ``crossing``, with ``source`` (layers), ``budgets`` (FLOPs) and
            ``around`` (multiples of the crossing).

    Raises:
        ConfigError: a value is not accepted, or arms or τ make no sense at several FLOPs.
    """
    source = converted("crossing.source", values.get("source"), int, True)
    if source is None:
        raise ConfigError("crossing.source: got none; accepted: a number of layers")
    check_value("crossing.source", source, like="model.num_layers")
    budgets = _numbers("budgets", values.get("budgets"), "FLOPs")
    if len(budgets) < LEAST_BUDGETS:
        raise ConfigError(
            f"crossing.budgets: got {len(budgets)}; accepted: at least {LEAST_BUDGETS} different "
            f"numbers of FLOPs"
        )
    around = _numbers("around", values.get("around", [*AROUND]), "multiples of the crossing")
    if not around:
        raise ConfigError("crossing.around: got none; accepted: multiples of the crossing")
    if FIXED in arms:
        raise ConfigError(
            f"arms: got {FIXED} with crossing; accepted: arms that grow, {SHORT}, {NEVER} (both "
            f"depths are trained alone anyway)"
        )
    if not any(arm not in SCRATCH for arm in arms):
        raise ConfigError(
            f"arms: got {', '.join(arms) or 'none'} with crossing, none of which grows; accepted: "
            f"an arm that grows, as {source}_layers"
        )
    for tau in taus:
        if tau == PILOT or tau >= 1:
            raise ConfigError(
                f"tau: got {tau if tau == PILOT else f'{tau:g}'} with crossing; accepted: "
                f"fractions (runs at several FLOPs have other numbers of steps)"
            )
    return Asked(source, budgets, around)


def _numbers(key: str, values: Any, what: str) -> list[float]:
    """Different numbers above 0, in ascending order."""
    accepted = f"accepted: a list of {what}"
    if not isinstance(values, list):
        raise ConfigError(f"crossing.{key}: got {shown(values)}; {accepted}")
    found = []
    for value in values:
        number = converted(f"crossing.{key}", value, float)
        if not 0 < number < math.inf:
            raise ConfigError(f"crossing.{key}: got {shown(value)}; accepted: {what} above 0")
        found.append(number)
    texts = [f"{number:.6g}" for number in found]
    for text in texts:
        if texts.count(text) > 1:
            raise ConfigError(f"crossing.{key}: got {text} twice; {accepted}, each once")
    return sorted(found)


def budget_text(flops: float) -> str:
    """A budget as names of cells have it: ``2e12``."""
    digits, _, power = f"{flops:.6g}".partition("e")
    return f"{digits}e{int(power)}" if power else digits


def crossings_of(asked: Asked, bases: Sequence[SizeCells], folder: Path) -> list[GridCrossing]:
    """The depths alone of every size and schedule, over the seeds.

    Args:
        bases: the cells of each size, schedule and seed.
        folder: of the study's run folders.

    Raises:
        ConfigError: a size is no deeper than the source, a budget pays for no step, or budgets pay
            for too few different numbers of steps.
    """
    groups: dict[tuple[str, str], list[SizeCells]] = {}
    for base in bases:
        groups.setdefault((base.name, base.schedule), []).append(base)
    found = []
    for (size, schedule), seeds in groups.items():
        target = seeds[0].layers
        if asked.source >= target:
            raise ConfigError(
                f"crossing.source: got {asked.source} with {target} layers of size {size}; "
                f"accepted: fewer layers than to_layers"
            )
        depths = (asked.source, target)
        cells = [
            _alone(base, depth, budget)
            for budget in asked.budgets
            for base in seeds
            for depth in depths
        ]
        shared = share_runs(cells, folder)
        pairs = list(zip(shared[::2], shared[1::2], strict=True))
        steps = distinct([(shallow.flops + deep.flops) / 2 for shallow, deep in pairs])
        if steps < LEAST_BUDGETS:
            raise ConfigError(
                f"crossing.budgets: got {', '.join(map(budget_text, asked.budgets))}, which pay "
                f"for {steps} different runs of size {size}; accepted: at least {LEAST_BUDGETS}"
            )
        found.append(GridCrossing(size, schedule, *depths, asked.budgets, pairs))
    return found


def _alone(base: SizeCells, depth: int, budget: float) -> Cell:
    cell = base.alone(depth, budget_text(budget), budget)
    if cell.flops > budget:
        one = step_flops(model_shape(cell.config), cell.config)
        raise ConfigError(
            f"crossing.budgets: got {budget_text(budget)}, which pays for no step of size "
            f"{base.name} with {depth} layers ({flops_text(one)} FLOPs); accepted: more"
        )
    return cell


def spanned(
    asked: Asked, crossings: Sequence[GridCrossing], bases: Sequence[SizeCells],
    arms: list[str], taus: list[Any], inits: list[str],
) -> list[SizeCells]:  # fmt: skip
    """The cells of each size, schedule and seed, once for every multiple of their crossing.

    Raises:
        ConfigError: an arm cannot run at the least multiple of the least budget, where a crossing
            may lie.
    """
    known = {(one.size, one.schedule): (one, one.found()) for one in crossings}
    least = asked.around[0] * asked.budgets[0]
    found, checked = [], set()
    for base in bases:
        crossing, at = known[base.name, base.schedule]
        if (base.name, base.schedule) not in checked:  # a seed changes nothing here
            checked.add((base.name, base.schedule))
            smallest = base.around(Span(f"{asked.around[0]:g}", least))
            _check_smallest(smallest, least, arms, taus, inits)
        found += [base.around(crossing.span(factor, at)) for factor in asked.around]
    return found


def _check_smallest(
    base: SizeCells, flops: float, arms: list[str], taus: list[Any], inits: list[str]
) -> None:
    try:
        for cell in base.cells(arms, taus, inits, lambda config: (1, "")):
            check_run(cell.config, smallest_world(cell.config))
            if cell.flops > flops:
                raise ConfigError("it pays for no step")
    except ConfigError as error:
        raise ConfigError(
            f"crossing.budgets: got {budget_text(flops)} FLOPs as the least budget times the least "
            f"of crossing.around, too few for what grows at size {base.name} ({error}); accepted: "
            f"more"
        ) from None


def places(cells: Sequence[Cell], crossings: Sequence[GridCrossing]) -> list[GridCrossing]:
    """The crossings, whose cells are those of the grid: runs are shared among all of these."""
    by_name = {cell.name: cell for cell in cells}
    return [
        replace(one, pairs=[(by_name[low.name], by_name[high.name]) for low, high in one.pairs])
        for one in crossings
    ]


def waited_for(crossings: Sequence[GridCrossing], cells: Sequence[Cell]) -> list[Cell]:
    """The depths alone for whose crossing any of ``cells`` waits."""
    waiting = {(cell.size, cell.config.schedule.name) for cell in cells if cell.unknown == WAITS}
    return [cell for one in crossings if (one.size, one.schedule) in waiting for cell in one.cells]


def budget_of(cell: Cell) -> str:
    """The budget of a depth alone, as its name has it."""
    return cell.axes[BUDGET]
