"""Does growing pay? Each run that grows against fixed-size training and against the short control
of equal FLOPs: by size and family, for each seed and over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_progressive.compare.arms import FIXED as FIXED_ARM
from megatron_progressive.compare.arms import SHORT as SHORT_ARM
from megatron_progressive.compare.arms import Comparison, Missing
from megatron_progressive.compare.decision import DOES_NOT_PAY, Against, overall
from megatron_progressive.compare.verdict import Verdict, paired, verdicts
from megatron_progressive.compare.verdict_words import study_sentence, study_title
from megatron_progressive.grid.cells import FIXED, SHORT
from megatron_progressive.grid.results import Result, sizes_of
from megatron_progressive.runs.reading import Run
from megatron_progressive.runtime.progress import Say


@dataclass(frozen=True)
class Finding:
    """One family at one size against its controls."""

    size: str
    params: int
    family: str
    seeds: list[int]
    """Finished ones."""
    flops_share: float | None
    """Its total FLOPs over fixed-size's."""
    to_fixed: Against
    """Its outcome: whether it has fewer FLOPs and ends within 0.5 % of fixed-size."""
    controls: list[Against]
    """Against each control of equal FLOPs."""
    outcome: str
    """Whether it ends below every one of these that is there: ``pays``, ``does not pay``,
    ``open``."""
    mixed: list[bool]
    """Of each seed whose mixing could be measured."""
    sentence: str
    verdicts: list[Verdict] = field(default_factory=list)
    """Of each seed."""


def comparisons(results: Sequence[Result], grid_file: str) -> dict[str, Comparison]:
    """The comparison of each run that grows and is finished, by its cell's name."""
    found = {}
    for result in results:
        if result.cell.arm in (FIXED, SHORT) or result.run is None or not result.run.finished:
            continue
        fixed = _counterpart(result, results, FIXED_ARM)
        short = _counterpart(result, results, SHORT_ARM)
        missing = [
            Missing(
                result.cell.name, arm, other.status.state if other else "not in the grid",
                f"mprog grid run {grid_file}" + (f" --cell {other.cell.name}" if other else ""),
            )
            for arm, other in ((FIXED_ARM, fixed), (SHORT_ARM, short))
            if _finished(other) is None
        ]  # fmt: skip
        found[result.cell.name] = Comparison(
            result.run, _finished(fixed), _finished(short), [], missing
        )
    return found


def _finished(result: Result | None) -> Run | None:
    return None if result is None or result.loss is None else result.run


def _counterpart(grown: Result, results: Sequence[Result], arm: str) -> Result | None:
    cell = grown.cell
    for other in results:
        if arm == SHORT_ARM and other.cell.control_of == cell.name:
            return other
        same = (other.cell.size, other.cell.seed) == (cell.size, cell.seed)
        setting = other.cell.setting == cell.setting
        if arm == FIXED_ARM and other.cell.arm == FIXED and same and setting:
            return other
    return None


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
    if share is not None and share >= 1:  # as FLOPs are counted, no seed changes that
        to_fixed = replace(to_fixed, outcome=DOES_NOT_PAY)
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
        sentence=study_sentence(share, to_fixed, controls),
        verdicts=mine,
    )


def distinct(found: Sequence[Finding]) -> list[Finding]:
    """Findings of different runs: those that cells share under several names count once."""
    first: dict[tuple[str, ...], Finding] = {}
    for one in found:
        runs = tuple(verdict.run for verdict in one.verdicts)
        first.setdefault(runs or (one.size, one.family), one)
    return list(first.values())


def title(name: str, found: Sequence[Finding]) -> str:
    """The study's finding in one line (:func:`.verdict_words.study_title`)."""
    found = distinct(found)
    return study_title(name, [one.controls for one in found], [one.to_fixed for one in found])
