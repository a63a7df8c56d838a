"""Does growing pay? Each run that grows against fixed-size training and against the controls of
equal FLOPs: by size and family, for each seed and over seeds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_progressive.compare.advise.regime import Regime, regime_of
from megatron_progressive.compare.arms import FIXED as FIXED_ARM
from megatron_progressive.compare.arms import NEVER as NEVER_ARM
from megatron_progressive.compare.arms import SHORT as SHORT_ARM
from megatron_progressive.compare.arms import Comparison, Missing, depth_words
from megatron_progressive.compare.decision import NOT_BELOW, Against, overall
from megatron_progressive.compare.pairs import paired
from megatron_progressive.compare.verdict import Verdict, verdicts
from megatron_progressive.compare.verdict_words import sentence, study_sentence, study_title
from megatron_progressive.grid.cells import FIXED, NEVER, SCRATCH, SHORT
from megatron_progressive.grid.grid import Grid
from megatron_progressive.grid.results import Result, sizes_of
from megatron_progressive.runs.reading import Run
from megatron_progressive.runtime.progress import Say

NOT_IN_THE_GRID = "not in the grid"
"""Why a control is missing that the grid's arms do not name."""


@dataclass(frozen=True)
class Finding:
    """One family at one size against its controls."""

    size: str
    params: int
    family: str
    seeds: list[int]
    """The seeds that are finished."""
    flops_share: float | None
    """The family's total FLOPs over those of fixed-size training."""
    to_fixed: Against
    """The comparison with fixed-size training; its outcome is ``below`` where the run has fewer
    FLOPs and ends within 0.5 % of it."""
    controls: list[Against]
    """The comparisons with each control of equal FLOPs."""
    outcome: str
    """Whether it ends below every one of these controls: ``pays``, ``does not pay`` or ``open``."""
    mixed: list[bool]
    """Whether it mixed, for each seed whose mixing could be measured."""
    sentence: str
    regime: Regime
    """What was trained, how much, and how it grew: what tells how near a plan is to it."""
    verdicts: list[Verdict] = field(default_factory=list)
    """The verdict on each seed."""


def comparisons(results: Sequence[Result], grid: Grid) -> dict[str, Comparison]:
    """The comparison of each run that grows and is finished, by its cell's name."""
    found = {}
    for result in results:
        if result.cell.arm in SCRATCH or result.run is None or not result.run.finished:
            continue
        fixed = [r for r in results if r.cell.arm == FIXED and _alike(r, result)][:1]
        mine = [r for r in results if r.cell.control_of == result.cell.name]
        short, never = ([r for r in mine if r.cell.arm == arm] for arm in (SHORT, NEVER))
        missing = [
            one
            for arm, key, controls in (
                (FIXED_ARM, FIXED, fixed), (SHORT_ARM, SHORT, short), (NEVER_ARM, NEVER, never),
            )
            if key != FIXED or not grid.crossings  # whose depths alone are the controls
            for one in _missing(result, arm, key, controls, grid)
        ]  # fmt: skip
        found[result.cell.name] = Comparison(
            result.run, next(iter(_finished(fixed)), None), next(iter(_finished(short)), None),
            _finished(never), [], missing,
        )  # fmt: skip
    return found


def _alike(fixed: Result, grown: Result) -> bool:
    cell, other = grown.cell, fixed.cell
    return (other.size, other.seed, other.setting) == (cell.size, cell.seed, cell.setting)


def _finished(results: Sequence[Result]) -> list[Run]:
    return [r.run for r in results if r.loss is not None and r.run is not None]


def _missing(
    grown: Result, arm: str, key: str, controls: Sequence[Result], grid: Grid
) -> list[Missing]:
    """The controls of a run that grows, as far as they are not finished, with the commands that
    make them."""
    command = ["mprog", "grid", "run", str(grid.file), *grid.overrides]
    name = grown.cell.name
    if not controls:
        arms = json.dumps([*grid.arms, key], separators=(",", ":"))
        words = [word for word in command if not word.startswith("arms=")]
        return [Missing(name, arm, NOT_IN_THE_GRID, shlex.join([*words, f"arms={arms}"]))]
    return [
        Missing(
            name, arm, one.status.state, shlex.join([*command, "--cell", one.cell.name]),
            depth_words(one.cell.config) if arm == NEVER_ARM else "",
        )
        for one in controls
        if one.loss is None
    ]  # fmt: skip


def findings(results: Sequence[Result], compared: dict[str, Comparison], say: Say) -> list[Finding]:
    """What the finished cells say, by size and then by family."""
    judged = dict(zip(compared, verdicts(list(compared.values()), say), strict=True))
    found = []
    for size in sizes_of(results):
        groups: dict[str, list[Result]] = {}
        for result in results:
            if result.cell.size == size and result.cell.name in judged:
                groups.setdefault(result.family, []).append(result)
        for members in groups.values():
            names = [result.cell.name for result in members]
            found.append(
                _finding(members, [judged[n] for n in names], [compared[n] for n in names])
            )
    return found


def _finding(members: Sequence[Result], mine: list[Verdict], compared: list[Comparison]) -> Finding:
    first = members[0]
    to_fixed, controls = paired(compared)
    speedups = [v.speedup_flops for v in mine if v.speedup_flops]
    share = 1 / float(np.mean(speedups)) if speedups else None
    has_fixed = any(c.fixed or any(m.arm == FIXED_ARM for m in c.missing) for c in compared)
    if share is not None and share >= 1:  # as FLOPs are counted, no seed changes that
        to_fixed = replace(to_fixed, outcome=NOT_BELOW)
    return Finding(
        size=first.cell.size,
        params=first.params,
        family=first.family,
        seeds=[v.seed for v in mine],
        flops_share=share,
        to_fixed=to_fixed,
        controls=controls,
        outcome=overall(controls),
        mixed=[v.mixing.mixed for v in mine if v.mixing is not None],
        sentence=study_sentence(share, to_fixed, controls)
        if has_fixed  # a crossing study has none
        else sentence(controls).removesuffix("."),
        regime=regime_of(first.cell.config),
        verdicts=mine,
    )


def distinct(found: Sequence[Finding]) -> list[Finding]:
    """The findings of different runs; runs that cells share under several names count once."""
    first: dict[tuple[str, ...], Finding] = {}
    for one in found:
        runs = tuple(verdict.run for verdict in one.verdicts)
        first.setdefault(runs or (one.size, one.family), one)
    return list(first.values())


def title(name: str, found: Sequence[Finding]) -> str:
    """The study's finding in one line (:func:`.verdict_words.study_title`)."""
    found = distinct(found)
    return study_title(name, [one.controls for one in found], [one.to_fixed for one in found])
