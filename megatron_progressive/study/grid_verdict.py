"""Does growing pay? Each run that grows against fixed-size training and against the short control
of equal FLOPs: by size and family, for each seed and over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import t as student

from megatron_progressive.study.arms import FIXED as FIXED_ARM
from megatron_progressive.study.arms import SHORT as SHORT_ARM
from megatron_progressive.study.arms import Comparison, Missing
from megatron_progressive.study.cells import FIXED, SHORT
from megatron_progressive.study.fits import LEVEL
from megatron_progressive.study.gaps import MIXED_PERCENT
from megatron_progressive.study.grid_results import Result, sizes_of
from megatron_progressive.study.runs import Run
from megatron_progressive.study.verdict import LEVEL_PERCENT, Verdict, percent, verdicts


@dataclass(frozen=True)
class Gap:
    """Final validation loss above (+) or below (-) a control's, in %, over seeds."""

    seeds: list[int]
    values: list[float]
    mean: float | None
    """None where no seed has it."""
    low: float | None
    """Interval of the mean by Student's t; None for fewer than two seeds."""
    high: float | None


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
    to_fixed: Gap
    to_short: Gap
    mixed: list[bool]
    """Of each seed whose mixing could be measured."""
    pays_fixed: bool | None
    """Whether it has fewer FLOPs and ends within 0.5 % of fixed-size; None where that is open."""
    pays_short: bool | None
    """Whether it ends below the short control; None where that is open."""
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


def findings(results: Sequence[Result], compared: dict[str, Comparison]) -> list[Finding]:
    """What the finished cells say, by size and then by family."""
    judged = dict(zip(compared, verdicts(list(compared.values())), strict=True))
    found = []
    for size in sizes_of(results):
        groups: dict[str, list[Result]] = {}
        for result in results:
            if result.cell.size == size and result.cell.name in judged:
                groups.setdefault(result.family, []).append(result)
        for members in groups.values():
            found.append(_finding(members, [judged[r.cell.name] for r in members]))
    return found


def _finding(members: Sequence[Result], mine: list[Verdict]) -> Finding:
    first = members[0]
    to_fixed = _gap([(v.seed, v.loss_gap_percent) for v in mine])
    to_short = _gap([(v.seed, v.short_gap_percent) for v in mine])
    speedups = [v.speedup_flops for v in mine if v.speedup_flops]
    share = 1 / float(np.mean(speedups)) if speedups else None
    pays_fixed = _below(to_fixed, MIXED_PERCENT)
    if share is not None and share >= 1:
        pays_fixed = False
    pays_short = _below(to_short, -LEVEL_PERCENT)
    return Finding(
        size=first.cell.size,
        params=first.params,
        family=first.family,
        seeds=[v.seed for v in mine],
        flops_share=share,
        to_fixed=to_fixed,
        to_short=to_short,
        mixed=[v.mixing.mixed for v in mine if v.mixing is not None],
        pays_fixed=pays_fixed,
        pays_short=pays_short,
        sentence=_sentence(share, to_fixed, to_short, pays_fixed, pays_short),
        verdicts=mine,
    )


def _gap(pairs: list[tuple[int, float | None]]) -> Gap:
    known = [(seed, gap) for seed, gap in pairs if gap is not None and math.isfinite(gap)]
    values = [gap for _, gap in known]
    seeds = [seed for seed, _ in known]
    if not values:
        return Gap(seeds, values, None, None, None)
    mean = float(np.mean(values))
    if len(values) < 2:
        return Gap(seeds, values, mean, None, None)
    half = float(
        student.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    )
    return Gap(seeds, values, mean, mean - half, mean + half)


def _below(gap: Gap, bound: float) -> bool | None:
    """Whether the gap is at or below a bound; None where its seeds do not tell."""
    if gap.mean is None:
        return None
    if gap.low is None or gap.high is None:
        return gap.mean <= bound
    if gap.high <= bound:
        return True
    return False if gap.low > bound else None


def gap_text(gap: Gap) -> str:
    """``+1.20 %``, or ``+1.20 % (+0.80 to +1.60)`` over several seeds."""
    if gap.mean is None:
        return "–"
    if gap.low is None or gap.high is None:
        return f"{gap.mean:+.2f} %"
    return f"{gap.mean:+.2f} % ({gap.low:+.2f} to {gap.high:+.2f})"


def _sentence(
    share: float | None, to_fixed: Gap, to_short: Gap, pays_fixed: bool | None,
    pays_short: bool | None,
) -> str:  # fmt: skip
    parts = []
    if to_fixed.mean is None or share is None:
        parts.append("against fixed-size: open, there is no finished one")
    else:
        outcome = {True: "pays", False: "does not pay", None: "open"}[pays_fixed]
        ends = f"{percent(to_fixed.mean)} {'above' if to_fixed.mean > 0 else 'below'}"
        parts.append(
            f"against fixed-size: {outcome} ({100 * share:.0f} % of its FLOPs, ends {ends} it"
            + (f", more than {MIXED_PERCENT} %" if pays_fixed is False and share < 1 else "")
            + ")"
        )
    if to_short.mean is None:
        parts.append("against the short control: open, there is no finished one")
    elif pays_short is None:
        parts.append(f"against the short control: open at these seeds ({gap_text(to_short)})")
    elif abs(to_short.mean) <= LEVEL_PERCENT:
        parts.append("against the short control: level, it does not pay")
    else:
        outcome = "pays" if pays_short else "LOSES"
        ends = f"{percent(to_short.mean)} {'above' if to_short.mean > 0 else 'below'}"
        parts.append(f"against the short control of equal FLOPs: {outcome} (ends {ends} it)")
    seeds = max(len(to_fixed.seeds), len(to_short.seeds))
    wins = sum(value < -LEVEL_PERCENT for value in to_short.values)
    if seeds > 1:
        parts.append(f"below the short control in {wins} of {len(to_short.values)} seeds")
    else:
        parts.append("one seed")
    return "; ".join(parts)


def distinct(found: Sequence[Finding]) -> list[Finding]:
    """Findings of different runs: those that cells share under several names count once."""
    first: dict[tuple[str, ...], Finding] = {}
    for one in found:
        runs = tuple(verdict.run for verdict in one.verdicts)
        first.setdefault(runs or (one.size, one.family), one)
    return list(first.values())


def title(name: str, found: Sequence[Finding]) -> str:
    """The answer in one line."""
    found = distinct(found)
    judged = [one for one in found if one.to_short.mean is not None]
    if not judged:
        return (
            f"{name}: no run that grows has its short control yet, so whether growing pays is open"
        )
    wins = sum(one.pays_short is True for one in judged)
    losses = sum(one.pays_short is False for one in judged)
    unclear = len(judged) - wins - losses
    close = [one for one in found if one.to_fixed.mean is not None]
    mixed = sum(one.pays_fixed is True for one in close)
    text = (
        f"{name}: at equal FLOPs growing beats the short control in {wins} of {len(judged)} "
        f"comparisons and does not in {losses}"
    )
    if unclear:
        text += f" ({unclear} open)"
    return f"{text}; within {MIXED_PERCENT} % of fixed-size in {mixed} of {len(close)}"
