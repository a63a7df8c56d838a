"""What a comparison finds, in numbers; :mod:`.verdict_words` has the sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from megatron_progressive.compare.arms import EQUAL_FLOPS, Comparison
from megatron_progressive.compare.decision import Against, against, overall
from megatron_progressive.compare.gaps import (
    MIXED_PERCENT,
    EqualLoss,
    equal_loss,
    gap_percent,
    has_loss,
)
from megatron_progressive.compare.mixing import MixingTime, mixing_time
from megatron_progressive.compare.verdict_words import headline, verdict_sentences
from megatron_progressive.config import ConfigError
from megatron_progressive.data import differ
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
    outcome: str
    """Whether growing pays at equal FLOPs, as the pairs of all seeds of this recipe decide:
    ``pays``, ``does not pay`` or ``open``."""
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
    recipes = [_recipe(comparison.progressive) for comparison in comparisons]
    finished: dict[str, list[Comparison]] = {}
    for recipe, comparison in zip(recipes, comparisons, strict=True):
        if comparison.progressive.finished:
            finished.setdefault(recipe, []).append(comparison)
    found = []
    for number, (recipe, comparison) in enumerate(zip(recipes, comparisons, strict=True), 1):
        say(f"judging {comparison.progressive.name}, {number} of {len(comparisons)}")
        found.append(_verdict(comparison, _seeds(comparison, finished.get(recipe, []))))
    return found


def _seeds(comparison: Comparison, finished: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of the recipe whose runs are on the same data, one for each seed."""
    data = comparison.progressive.trained_on
    same = [c for c in finished if not differ(c.progressive.trained_on, data)]
    return list({c.progressive.config.run.seed: c for c in same}.values())


def _recipe(run: Run) -> str:
    return repr({k: v for k, v in asdict(run.config).items() if k != "run"})


def paired(comparisons: Sequence[Comparison]) -> tuple[Against, list[Against]]:
    """What the finished runs of one recipe, of one seed or several, say against fixed-size and
    against each control of equal FLOPs.

    A pair has one seed, and so one order of data, and is validated on the same samples.
    """
    fixed = _paired("fixed-size", lambda c: c.fixed, comparisons, MIXED_PERCENT)
    return fixed, [_paired(name, control, comparisons) for name, control in EQUAL_FLOPS]


def _paired(
    name: str, control_of: Callable[[Comparison], Run | None], comparisons: Sequence[Comparison],
    bound: float = 0.0,
) -> Against:  # fmt: skip
    gaps: list[tuple[int, float]] = []
    left_out: list[str] = []
    diverged = False
    for comparison in comparisons:
        run, control = comparison.progressive, control_of(comparison)
        seed = run.config.run.seed
        if not has_loss(run):
            diverged = True
            left_out.append(f"seed {seed}: it diverged")
        elif control is None:
            continue  # named as missing
        elif not has_loss(control):
            left_out.append(f"seed {seed}: {control.name} diverged")
        elif control.config.run.seed != seed:
            left_out.append(f"seed {seed}: {control.name} has seed {control.config.run.seed}")
        elif control.config.train.eval_samples != run.config.train.eval_samples:
            left_out.append(f"seed {seed}: {control.name} is validated on other samples")
        else:
            gaps.append((seed, gap_percent(run.final_loss or 0.0, control.final_loss or 0.0)))
    return against(name, gaps, bound, left_out, diverged)


def _verdict(comparison: Comparison, seeds: list[Comparison]) -> Verdict:
    run, fixed, short = comparison.progressive, comparison.fixed, comparison.short
    loss, usable = run.final_loss, has_loss(run)
    to_fixed, controls = paired(seeds)
    gap = _gap(run, fixed)
    short_gap = _gap(run, short)
    speedup = _quotient(fixed.total_flops if fixed else None, run.total_flops)
    wall = _quotient(fixed.train_wall if fixed else None, run.train_wall)
    equal = equal_loss(run, fixed) if fixed and usable else None
    mixing, unknown = _mixing(run, fixed) if fixed and usable else (None, "")
    sentences = verdict_sentences(
        comparison,
        gap=gap,
        short_gap=short_gap,
        speedup=speedup,
        wall=wall,
        equal=equal,
        mixing=mixing,
        unknown=unknown,
        to_fixed=to_fixed,
        controls=controls,
    )
    complete = usable and fixed is not None and short is not None
    return Verdict(
        run=run.name,
        folder=str(run.folder),
        seed=run.config.run.seed,
        complete=complete,
        final_loss=loss,
        speedup_flops=speedup if usable else None,
        speedup_wall=wall if usable else None,
        loss_gap_percent=gap,
        short_gap_percent=short_gap,
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
    by_folder = {str(run.folder): _recipe(run) for run in runs}
    return list({by_folder[one.folder]: one for one in found}.values())
