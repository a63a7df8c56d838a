"""What a comparison finds, in numbers; :mod:`.verdict_words` has the sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_progressive.compare.arms import Comparison
from megatron_progressive.compare.decision import Against, overall
from megatron_progressive.compare.gaps import (
    EqualLoss,
    equal_loss,
    gap_percent,
    has_loss,
)
from megatron_progressive.compare.mixing import MixingTime, mixing_time
from megatron_progressive.compare.pairs import paired, recipe_of, seeds_of
from megatron_progressive.compare.verdict_words import headline, verdict_sentences
from megatron_progressive.config import ConfigError
from megatron_progressive.runs.reading import Run
from megatron_progressive.runtime.progress import Say


@dataclass(frozen=True)
class Verdict:
    """The verdict on one progressive run against its controls. A number is None where its control
    is missing."""

    run: str
    folder: str
    seed: int
    complete: bool
    final_loss: float | None
    speedup_flops: float | None
    """The total FLOPs of the fixed-size run over this run's."""
    speedup_wall: float | None
    """The training seconds of the fixed-size run over this run's, including expansion pauses."""
    loss_gap_percent: float | None
    """The final validation loss above (+) or below (-) the fixed-size run's, in %."""
    short_gap_percent: float | None
    """The final validation loss above (+) or below (-) the short control's, in %."""
    never_gap_percent: float | None
    """The final validation loss above (+) or below (-) that of the best source that never grew, in
    %."""
    outcome: str
    """Whether growing pays at equal FLOPs: ``pays`` (it ends below every control), ``does not pay``
    or ``open``, by the pairs of all seeds of this recipe."""
    to_fixed: Against
    controls: list[Against]
    """The comparisons with each control of equal FLOPs."""
    equal_loss: EqualLoss | None
    mixing: MixingTime | None
    """The mixing time; None also where too few validations follow the expansion."""
    headline: str
    """The finding in one line."""
    verdict: str
    """The finding in full sentences."""
    sentences: list[str] = field(default_factory=list)


def verdicts(comparisons: Sequence[Comparison], say: Say = lambda text: None) -> list[Verdict]:
    """The verdict of each comparison; comparisons of one recipe share what its seeds decide.

    Args:
        say: told which run is judged.
    """
    recipes = [recipe_of(comparison.progressive) for comparison in comparisons]
    finished: dict[str, list[Comparison]] = {}
    for recipe, comparison in zip(recipes, comparisons, strict=True):
        if comparison.progressive.finished:
            finished.setdefault(recipe, []).append(comparison)
    found = []
    for number, (recipe, comparison) in enumerate(zip(recipes, comparisons, strict=True), 1):
        say(f"judging {comparison.progressive.name}, {number} of {len(comparisons)}")
        found.append(_verdict(comparison, seeds_of(comparison, finished.get(recipe, []))))
    return found


def _verdict(comparison: Comparison, seeds: list[Comparison]) -> Verdict:
    run, fixed, short = comparison.progressive, comparison.fixed, comparison.short
    loss, ended = run.final_loss, has_loss(run)
    to_fixed, controls = paired(seeds)
    gap = _gap(run, fixed)
    short_gap = _gap(run, short)
    never = [
        (control, gap_percent(loss or 0.0, control.final_loss or 0.0))
        for control in comparison.never
        if ended and has_loss(control)
    ]
    never.sort(key=lambda pair: -pair[1])  # the best first
    speedup = _quotient(fixed.total_flops if fixed else None, run.total_flops)
    wall = _quotient(fixed.train_wall if fixed else None, run.train_wall)
    equal = equal_loss(run, fixed) if fixed and ended else None
    mixing, unknown = _mixing(run, fixed) if fixed and ended else (None, "")
    sentences = verdict_sentences(
        comparison,
        gap=gap,
        short_gap=short_gap,
        never=never,
        speedup=speedup,
        wall=wall,
        equal=equal,
        mixing=mixing,
        unknown=unknown,
        to_fixed=to_fixed,
        controls=controls,
    )
    complete = ended and not comparison.missing
    return Verdict(
        run=run.name,
        folder=str(run.folder),
        seed=run.config.run.seed,
        complete=complete,
        final_loss=loss,
        speedup_flops=speedup if ended else None,
        speedup_wall=wall if ended else None,
        loss_gap_percent=gap,
        short_gap_percent=short_gap,
        never_gap_percent=never[0][1] if never else None,
        outcome=overall(controls),
        to_fixed=to_fixed,
        controls=controls,
        equal_loss=equal,
        mixing=mixing,
        headline=headline(run, gap, controls, speedup),
        verdict=" ".join(sentences),
        sentences=sentences,
    )


def _gap(run: Run, control: Run | None) -> float | None:
    if control is None or run.final_loss is None or control.final_loss is None:
        return None
    gap = gap_percent(run.final_loss, control.final_loss)
    return gap if math.isfinite(gap) else None


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _mixing(run: Run, fixed: Run) -> tuple[MixingTime | None, str]:
    """When the run met the fixed-size run; None, and the reason, where that cannot be told."""
    try:
        return mixing_time(run, fixed), ""
    except ConfigError as error:
        return None, str(error)


def recipes(found: Sequence[Verdict], runs: Sequence[Run]) -> list[Verdict]:
    """One verdict for each recipe, whose seeds share what was decided."""
    by_folder = {str(run.folder): recipe_of(run) for run in runs}
    return list({by_folder[one.folder]: one for one in found}.values())
