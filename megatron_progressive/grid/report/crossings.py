"""What a crossing study found at each size: where two depths cost the same for the same loss, and
what growing did around that budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_progressive.compare.decision import Against
from megatron_progressive.compare.page import items, picture, table
from megatron_progressive.compare.verdict_words import gap_text, short_text
from megatron_progressive.grid.cells import AROUND, SCRATCH
from megatron_progressive.grid.crossing import GridCrossing, budget_of, interval_text
from megatron_progressive.grid.grid import Grid
from megatron_progressive.grid.labels import families
from megatron_progressive.grid.report.verdict import Finding
from megatron_progressive.grid.results import Result
from megatron_progressive.laws.crossing import Crossing
from megatron_progressive.runtime.text import flops_text


@dataclass(frozen=True)
class Pair:
    """Both depths alone with one budget and seed, both finished."""

    budget: str
    seed: int
    flops: float
    """The mean of both runs."""
    shallow: float
    """The final validation loss, in nats per token or image, as ``deep`` is."""
    deep: float


@dataclass(frozen=True)
class Around:
    """A family that grows, at one multiple of the crossing."""

    factor: str
    family: str
    line: str
    """The family without this multiple, which others share."""
    flops: float
    """The total FLOPs of a run (seeds averaged)."""
    losses: list[float]
    """The final validation loss of each finished seed."""
    outcome: str
    """Whether it pays (:attr:`.Finding.outcome`)."""
    controls: list[Against]


@dataclass(frozen=True)
class Study:
    """The crossing at one size, under one schedule."""

    size: str
    schedule: str
    source: int
    target: int
    crossing: Crossing | None
    """None until every depth alone is finished."""
    title: str
    """What was found, in one line."""
    sentences: list[str]
    """The same in full, with what reserves it."""
    growth: list[str]
    """What growing did at each multiple, one sentence for each family."""
    pairs: list[Pair]
    around: list[Around]


def studies(grid: Grid, results: Sequence[Result], findings: Sequence[Finding]) -> list[Study]:
    """The crossing of each size and schedule of a grid; none in a grid that asks for none."""
    by_name = {result.cell.name: result for result in results}
    found = []
    for one in grid.crossings:
        crossing = one.found()
        pairs = _pairs(one, by_name)
        around = _around(one, results, findings)
        title = f"{one.size}: {one.finding(crossing)}"
        if len({other.schedule for other in grid.crossings}) > 1:
            title = f"{one.size}, {one.schedule}: {one.finding(crossing)}"
        found.append(
            Study(
                one.size, one.schedule, one.source, one.target, crossing, title,
                _sentences(one, crossing), _growth(around), pairs, around,
            )
        )  # fmt: skip
    return found


def _pairs(one: GridCrossing, by_name: dict[str, Result]) -> list[Pair]:
    found = []
    for shallow, deep in one.pairs:
        low, high = by_name[shallow.name], by_name[deep.name]
        if low.loss is None or high.loss is None:
            continue
        flops = ((low.flops or 0.0) + (high.flops or 0.0)) / 2
        found.append(Pair(budget_of(shallow), shallow.seed, flops, low.loss, high.loss))
    return found


def _around(
    one: GridCrossing, results: Sequence[Result], findings: Sequence[Finding]
) -> list[Around]:
    judged = {finding.family: finding for finding in findings if finding.size == one.size}
    lines = families([result.cell for result in results], without=[AROUND])
    members: dict[str, list[Result]] = {}
    for result in results:
        cell = result.cell
        mine = (cell.size, cell.config.schedule.name) == (one.size, one.schedule)
        if mine and cell.arm not in SCRATCH and result.loss is not None:
            members.setdefault(result.family, []).append(result)
    found = [
        Around(
            done[0].cell.axes[AROUND],
            family,
            lines[done[0].cell.name],
            float(np.mean([r.flops or 0.0 for r in done])),
            [r.loss or 0.0 for r in done],
            judged[family].outcome,
            judged[family].controls,
        )
        for family, done in members.items()
        if family in judged
    ]
    return sorted(found, key=lambda around: float(around.factor))


def _sentences(one: GridCrossing, crossing: Crossing | None) -> list[str]:
    if crossing is None:
        return [f"{one.finding(crossing)}; what grows waits until all of them are."]
    notes = [f"{note[:1].upper()}{note[1:]}." for note in crossing.notes]
    at = crossing.compute.value
    if at is None:
        why = one.why_none(crossing)
        return [f"{why[:1].upper()}{why[1:]}. So nothing is grown around a crossing here.", *notes]
    found = (
        f"With fewer than {flops_text(at)} FLOPs {one.source} layers from scratch end lower, with "
        f"more {one.target} layers do ({interval_text(crossing)}; {crossing.pairs} pairs of one "
        f"budget and seed, whose differences have a standard deviation of {crossing.spread:.4f} "
        f"around the fit)."
    )
    return [found, *notes]


def _growth(around: Sequence[Around]) -> list[str]:
    found = []
    for one in around:
        where = "At the crossing" if one.factor == "1" else f"At {one.factor} times the crossing"
        said = short_text(one.controls)
        found.append(f"{where} ({flops_text(one.flops)} FLOPs), {one.line}: {said}.")
    return found


def as_values(study: Study) -> dict[str, Any]:
    """A study as plain values for ``report.json``."""
    return asdict(study)


def section(found: Sequence[Study], path: Path | None) -> str:
    """The part of the page about crossings; empty without any."""
    if not found:
        return ""
    parts = ["<h2>Where the depths cross</h2>"]
    if path is not None:
        parts.append(picture(path))
    for study in found:
        parts.append(f"<h3>{escape(study.title)}</h3>{items(study.sentences + study.growth)}")
        parts += [_alone_table(study), _around_table(study)]
    parts.append(
        "<p>Both depths are trained from scratch with each budget, each run with a complete "
        "schedule of its own; a pair has one seed, and so one order of data. The difference of "
        "each pair is fitted over the logarithm of the budget, and the interval is the budgets at "
        "which it cannot be told from zero (Fieller's method): no law is assumed. Below the "
        "crossing the shallow model that is never grown is the one to beat, above it the deep one "
        "from scratch.</p>"
    )
    return "".join(parts)


def _alone_table(study: Study) -> str:
    if not study.pairs:
        return ""
    head = ["budget", "seed", "FLOPs", f"loss, {study.source} layers",
            f"loss, {study.target} layers", "difference"]  # fmt: skip
    rows = [
        [pair.budget, str(pair.seed), flops_text(pair.flops), f"{pair.shallow:.4f}",
         f"{pair.deep:.4f}", f"{100 * (pair.shallow / pair.deep - 1):+.2f} %"]
        for pair in study.pairs
    ]  # fmt: skip
    return table(head, rows)


def _around_table(study: Study) -> str:
    if not study.around:
        return ""
    controls = [control.control for control in study.around[0].controls]
    head = ["run that grows", "times the crossing", "FLOPs", "loss", "pays?",
            *(f"loss to {control}" for control in controls), "pairs"]  # fmt: skip
    rows = [
        [one.line, f"{one.factor}x", flops_text(one.flops), f"{np.mean(one.losses):.4f}",
         one.outcome, *map(gap_text, one.controls),
         str(min((len(control.values) for control in one.controls), default=0))]
        for one in study.around
    ]  # fmt: skip
    return table(head, rows)
