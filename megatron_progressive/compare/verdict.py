"""What a comparison says, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_progressive.compare.arms import Comparison, depth_words
from megatron_progressive.compare.decision import (
    Against,
    above,
    evidence,
    overall,
    sentence,
    short_text,
)
from megatron_progressive.compare.gaps import MIXED_PERCENT, gap_percent
from megatron_progressive.compare.mixing import MixingTime, mixing_time
from megatron_progressive.compare.pairs import paired, recipe_of, seeds_of, usable
from megatron_progressive.config import ConfigError
from megatron_progressive.runs.reading import Run
from megatron_progressive.runtime.progress import Say
from megatron_progressive.runtime.text import short_counts

WORSE_PERCENT = 5.0
"""Final gap to fixed-size, in %, from which the run counts as failed (arXiv 2511.04981)."""


@dataclass(frozen=True)
class EqualLoss:
    """Where the fixed-size run first has the progressive run's final validation loss."""

    step: int
    flops: float
    compute_ratio: float
    """Its FLOPs there over the progressive run's total: above 1 progressive was cheaper."""
    lr_fraction: float
    """Its learning rate there over the peak: near 1 it has not decayed, which costs it loss."""


@dataclass(frozen=True)
class Verdict:
    """One progressive run against its controls; None where a control is missing."""

    run: str
    folder: str
    seed: int
    complete: bool
    final_loss: float | None
    speedup_flops: float | None
    """Total FLOPs of the fixed-size run over this run's."""
    speedup_wall: float | None
    """The same of training seconds, expansion pauses included."""
    loss_gap_percent: float | None
    """Final validation loss above (+) or below (-) the fixed-size run's, %."""
    short_gap_percent: float | None
    """Final validation loss above (+) or below (-) the short control's, %."""
    never_gap_percent: float | None
    """The same of the best source that never grew."""
    outcome: str
    """Whether growing pays at equal FLOPs: ``pays`` (it ends below every control), ``does not pay``
    or ``open``, by the pairs of all seeds of this recipe."""
    to_fixed: Against
    controls: list[Against]
    """Against each control of equal FLOPs."""
    equal_loss: EqualLoss | None
    mixing: MixingTime | None
    """None as well where too few validations follow the expansion."""
    headline: str
    """The finding in one line."""
    verdict: str
    """The finding in full sentences."""
    sentences: list[str] = field(default_factory=list)


def _ratio(value: float) -> str:
    return f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def _tokens(mixing: MixingTime) -> str:
    return f"{short_counts([mixing.tokens or 0])[0]} {mixing.unit}"


def _saved(ratio: float, less: str) -> str:
    """``2.0x fewer``, or ``1.3x more`` where nothing was saved."""
    if abs(ratio - 1) < 0.05:
        return "as much" if less == "less" else "as many"
    return f"{_ratio(ratio)} {less}" if ratio >= 1 else f"{_ratio(1 / ratio)} more"


def verdicts(comparisons: Sequence[Comparison], say: Say = lambda text: None) -> list[Verdict]:
    """The verdict of each comparison; those of one recipe share what its seeds decide.

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
    loss, ended = run.final_loss, usable(run)
    to_fixed, controls = paired(seeds)
    gap = _gap(run, fixed)
    short_gap = _gap(run, short)
    never = sorted((control for control in comparison.never if usable(control)), key=_loss)
    speedup = _quotient(fixed.total_flops if fixed else None, run.total_flops)
    wall = _quotient(fixed.train_wall if fixed else None, run.train_wall)
    equal = _equal_loss(run, fixed) if fixed and ended else None
    mixing, untold = _mixing(run, fixed) if fixed and ended else (None, "")
    missing = [f"{one.words} ({one.reason})" for one in comparison.missing]
    sentences = []
    if not run.finished:
        sentences.append(f"Unfinished: step {run.last_step} of {run.config.last_step}.")
    elif not ended:
        sentences.append("Diverged: its final validation loss is not a number.")
    if missing:
        sentences.append(f"Incomplete: no {' and no '.join(missing)}.")
    sentences += _fixed_sentences(run, fixed, gap, speedup, wall)
    sentences += _short_sentences(run, short, short_gap) + _never_sentences(run, never)
    if fixed is not None and ended:
        sentences.append(_equal_sentence(equal, fixed))
    sentences += _mixing_sentences(mixing) or [untold] * bool(untold)
    if run.finished:
        sentences.append(sentence(controls))
    if len(to_fixed.values) > 1:
        sentences.append(f"Gap to fixed-size: {evidence(to_fixed)}.")
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
        never_gap_percent=_gap(run, next(iter(never), None)),
        outcome=overall(controls),
        to_fixed=to_fixed,
        controls=controls,
        equal_loss=equal,
        mixing=mixing,
        headline=_headline(run, gap, controls, speedup, ended),
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


def _equal_loss(run: Run, fixed: Run) -> EqualLoss | None:
    if run.final_loss is None or not run.total_flops:
        return None
    reached = np.flatnonzero(fixed.evals["loss"] <= run.final_loss)
    if not len(reached):
        return None
    step, flops = fixed.evals["step"][reached[0]], float(fixed.evals["flops"][reached[0]])
    at = np.flatnonzero(fixed.train["step"] == step)
    peak = fixed.config.optim.lr
    return EqualLoss(
        step=int(step),
        flops=flops,
        compute_ratio=flops / run.total_flops,
        lr_fraction=float(fixed.train["lr"][at[0]]) / peak if len(at) and peak else float("nan"),
    )


def _mixing(run: Run, fixed: Run) -> tuple[MixingTime | None, str]:
    """When the run met the fixed-size run; None and why where that cannot be told."""
    try:
        return mixing_time(run, fixed), ""
    except ConfigError as error:
        return None, f"Whether it mixed cannot be told: {error}."


def mixing_title(found: Sequence[Verdict]) -> str:
    """The finding of the picture of gaps, in one line."""
    mixings = [verdict.mixing for verdict in found if verdict.mixing is not None]
    if len(mixings) != 1:
        mixed = sum(mixing.mixed for mixing in mixings)
        return (
            f"{mixed} of {len(mixings)} runs mixed within {MIXED_PERCENT} % of fixed-size after τ"
        )
    if mixings[0].tokens is not None:
        return f"Mixed within {MIXED_PERCENT} % of fixed-size {_tokens(mixings[0])} after τ"
    left = f"{mixings[0].gap_left_percent:+.2f} %"
    return f"Not mixed within {MIXED_PERCENT} % of fixed-size after τ: {left} at the end"


def _fixed_sentences(
    run: Run, fixed: Run | None, gap: float | None, speedup: float | None, wall: float | None
) -> list[str]:
    if fixed is None or gap is None:
        return []
    cost = []
    if speedup is not None:
        cost.append(f"{_saved(speedup, 'fewer')} FLOPs ({100 / speedup:.0f} % of them)")
    if wall is not None:
        cost.append(f"{_saved(wall, 'less')} training time")
    ends = f"It ends at {run.final_loss:.4f}, {above(gap)} fixed-size ({fixed.final_loss:.4f})"
    found = [f"{ends}, for {' and '.join(cost)}." if cost else f"{ends}."]
    if gap >= WORSE_PERCENT:
        found.append(_worse(run))
    return found


def _worse(run: Run) -> str:
    """The failure signature of a large final gap, with the causes that the configuration has."""
    late = run.config.expansion_steps()[-1] > 0.8 * run.config.train.steps + 0.5
    causes = ["τ > 0.8 T"] * late
    causes += [f"{run.config.schedule.name} schedule"] * (run.config.schedule.name != "wsd")
    likely = " and ".join(causes) or "none of the usual (τ > 0.8 T, cosine)"
    return f"Failure signature: final loss >= {WORSE_PERCENT:g} % worse; likely cause: {likely}."


def _short_sentences(run: Run, short: Run | None, gap: float | None) -> list[str]:
    if short is None or gap is None:
        return []
    return [
        f"At equal FLOPs it ends {above(gap)} the short control of "
        f"{short.config.train.steps:,} steps ({run.final_loss:.4f} against {short.final_loss:.4f})."
    ]


def _never_sentences(run: Run, never: Sequence[Run]) -> list[str]:
    """Against each source that never grew, the best first."""
    found = [
        f"{above(gap)} {depth_words(control.config)} that never grow, "
        f"{control.config.train.steps:,} steps ({run.final_loss:.4f} against "
        f"{control.final_loss:.4f})"
        for control in never
        if (gap := _gap(run, control)) is not None
    ]
    return [f"At equal FLOPs it ends {' and '.join(found)}."] if found else []


def _loss(run: Run) -> float:
    return run.final_loss or 0.0


def _equal_sentence(equal: EqualLoss | None, fixed: Run) -> str:
    if equal is None:
        return "The fixed-size run never reaches its final loss."
    cheaper = f"{_ratio(equal.compute_ratio)} the compute of the progressive run"
    rate = ""
    if equal.lr_fraction > 0.99:
        rate = "; its learning rate has not decayed there, which favours the progressive run"
    elif math.isfinite(equal.lr_fraction):
        rate = (
            f"; its learning rate has decayed to {100 * equal.lr_fraction:.0f} % of its peak there"
        )
    last = " (its last)" if equal.step == fixed.config.last_step else ""
    return (
        f"At equal loss: the fixed-size run is there at step {equal.step:,}{last} with "
        f"{cheaper}{rate}."
    )


def _mixing_sentences(mixing: MixingTime | None) -> list[str]:
    if mixing is None:
        return []
    if mixing.tokens is not None:
        return [
            f"It mixed within {MIXED_PERCENT} % of fixed-size {_tokens(mixing)} after τ "
            f"({mixing.steps:,} steps)."
        ]
    return [
        f"It did not mix: {mixing.consecutive} validations in a row within {MIXED_PERCENT} % of "
        f"fixed-size at the same step never came (at the end: {mixing.gap_left_percent:+.2f} %)."
    ]


def _headline(
    run: Run, gap: float | None, controls: Sequence[Against], speedup: float | None, ended: bool
) -> str:
    if not run.finished:
        return f"{run.name}: unfinished at step {run.last_step} of {run.config.last_step}"
    if not ended:
        return f"{run.name}: diverged"
    parts = []
    if gap is not None and speedup is not None:
        parts.append(f"{_saved(speedup, 'fewer')} FLOPs than fixed-size, loss {above(gap)} it")
    parts.append(short_text(controls))
    return f"{run.name}: {'; '.join(parts)}"


def recipes(found: Sequence[Verdict], runs: Sequence[Run]) -> list[Verdict]:
    """One verdict of each recipe, whose seeds share what was decided."""
    by_folder = {str(run.folder): recipe_of(run) for run in runs}
    return list({by_folder[one.folder]: one for one in found}.values())
