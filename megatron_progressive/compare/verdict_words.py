"""How the verdict is worded: every sentence, headline and title that says whether growing pays.

What is said is decided elsewhere: the numbers of one run in :mod:`.verdict`, and what several seeds
decide in :mod:`.decision`. All pages, tables and lines on a terminal take their words from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_progressive.compare.arms import Comparison, depth_words
from megatron_progressive.compare.decision import (
    BELOW,
    DOES_NOT_PAY,
    LEVEL_PERCENT,
    MOST_PAIRS,
    NOT_BELOW,
    OPEN,
    PAYS,
    POWER,
    Against,
    overall,
)
from megatron_progressive.compare.gaps import MIXED_PERCENT, EqualLoss, has_loss
from megatron_progressive.compare.mixing import MixingTime
from megatron_progressive.laws.fits import LEVEL
from megatron_progressive.runs.reading import Run
from megatron_progressive.runtime.text import short_counts

WORSE_PERCENT = 5.0
"""Final gap to fixed-size, in %, from which the run counts as failed (arXiv 2511.04981)."""


def percent(value: float) -> str:
    """A magnitude in %, with the digits that matter."""
    value = abs(value)
    return f"{value:.2f} %" if value < 1 else f"{value:.1f} %"


def above(gap: float) -> str:
    """``1.2 % above``, ``0.30 % below`` or ``level with``: how a gap in % stands to a control."""
    if abs(gap) < LEVEL_PERCENT:
        return "level with"
    return f"{percent(gap)} {'above' if gap > 0 else 'below'}"


def gap_text(one: Against) -> str:
    """A gap in a table: ``+1.20 %``, or ``+1.20 % (+0.80 to +1.60)`` over several pairs; ``–``
    without any."""
    if one.mean is None:
        return "–"
    if one.low is None or one.high is None:
        return f"{one.mean:+.2f} %"
    return f"{one.mean:+.2f} % ({one.low:+.2f} to {one.high:+.2f})"


def needed_text(one: Against) -> str:
    """How many pairs a difference of this size needs; ``–`` where its spread is not known."""
    if not one.spread:
        return "–"
    return f"more than {MOST_PAIRS:,}" if one.pairs_needed is None else f"{one.pairs_needed:,}"


def evidence(one: Against) -> str:
    """The gap and what its pairs can carry, for a sentence: ``+2.16 % (95 % +0.24 to +4.07 over 3
    pairs; 4 needed for 80 % power at a spread of 0.77 %)``."""
    if one.mean is None:
        text = "no finished pair"
    elif one.low is None or one.high is None:
        text = f"{one.mean:+.2f} % (one seed decides nothing)"
    elif not one.spread:
        text = f"{one.mean:+.2f} % ({len(one.values)} pairs that do not differ at all)"
    else:
        apart = f" to tell it from {one.bound:+g} %" if one.bound else ""
        text = (
            f"{one.mean:+.2f} % ({100 * LEVEL:.0f} % {one.low:+.2f} to {one.high:+.2f} over "
            f"{len(one.values)} pairs; {needed_text(one)} needed{apart} for {100 * POWER:.0f} % "
            f"power at a spread of {one.spread:.2f} %)"
        )
    return "; ".join([text, *(f"left out {reason}" for reason in one.left_out), *one.lacking])


def sentence(controls: Sequence[Against]) -> str:
    """The sentence that says whether growing pays at equal FLOPs, and against which controls."""
    there = [one for one in controls if one.mean is not None]
    lacking = [one.control for one in controls if one.mean is None]
    without = f" (without {' and '.join(lacking)})" if lacking else ""
    if not there:
        return f"Whether growing pays at equal FLOPs is open{without}."
    outcome = overall(controls)
    start = (
        "Whether growing pays at equal FLOPs is open"
        if outcome == OPEN
        else f"Growing {outcome} at equal FLOPs"
    )
    found = "; ".join(f"against {one.control}: {decided_evidence(one)}" for one in there)
    return f"{start}{without}, {found}."


def decided_evidence(one: Against) -> str:
    """:func:`evidence` behind what it decides, if it does."""
    return evidence(one) if one.outcome == OPEN else f"{one.outcome}, {evidence(one)}"


def short_text(controls: Sequence[Against]) -> str:
    """The same in the few words of a headline."""
    there = [one for one in controls if one.mean is not None]
    if not there:
        return "no control at equal FLOPs: whether it pays is open"
    named = " and ".join(f"{above(one.mean or 0.0)} {one.control}" for one in there)
    pairs = min(len(one.values) for one in there)
    lacking = [one.control for one in controls if one.mean is None]
    without = f", without {' and '.join(lacking)}" if lacking else ""
    return f"{named}: {overall(controls)} ({pairs} pair{'s' * (pairs != 1)}{without})"


def tally(outcomes: Sequence[str]) -> str:
    """How often each outcome occurs, as ``pays in 2 of 8 comparisons, does not pay in 1, open in
    5``."""
    parts = [
        f"{outcome} in {outcomes.count(outcome)}" for outcome in (DOES_NOT_PAY, OPEN)
        if outcome in outcomes
    ]  # fmt: skip
    many = f"comparison{'s' * (len(outcomes) != 1)}"
    first = f"pays in {outcomes.count(PAYS)} of {len(outcomes)} {many}"
    return ", ".join([first, *parts])


def verdict_sentences(
    comparison: Comparison,
    *,
    gap: float | None,
    short_gap: float | None,
    never: Sequence[tuple[Run, float]],
    speedup: float | None,
    wall: float | None,
    equal: EqualLoss | None,
    mixing: MixingTime | None,
    unknown: str,
    to_fixed: Against,
    controls: Sequence[Against],
) -> list[str]:
    """The verdict on one run in full sentences. A number is None where its control is missing.

    Args:
        comparison: the run and its controls.
        gap: its final validation loss above the fixed-size run's, %.
        short_gap: its final validation loss above the short control's, %.
        never: each source that never grew, the best first, and the final loss above its, %.
        speedup: total FLOPs of the fixed-size run over its own.
        wall: the same of training seconds.
        equal: where the fixed-size run has its final loss.
        mixing: when it mixed with the fixed-size run.
        unknown: why that cannot be told; empty where nothing stands in the way.
        to_fixed: what all seeds say against fixed-size training.
        controls: what all seeds say against each control of equal FLOPs.
    """
    run, fixed = comparison.progressive, comparison.fixed
    missing = [f"{one.words} ({one.reason})" for one in comparison.missing]
    sentences = []
    if not run.finished:
        sentences.append(f"Unfinished: step {run.last_step} of {run.config.last_step}.")
    elif not has_loss(run):
        sentences.append("Diverged: its final validation loss is not a number.")
    if missing:
        sentences.append(f"Incomplete: no {' and no '.join(missing)}.")
    sentences += _fixed_sentences(run, fixed, gap, speedup, wall)
    sentences += _short_sentences(run, comparison.short, short_gap) + _never_sentences(run, never)
    if fixed is not None and has_loss(run):
        sentences.append(_equal_sentence(equal, fixed))
    sentences += _mixing_sentences(mixing)
    if unknown:
        sentences.append(f"Whether it mixed cannot be told: {unknown}.")
    if run.finished:
        sentences.append(sentence(controls))
    if len(to_fixed.values) > 1:
        sentences.append(f"Gap to fixed-size: {evidence(to_fixed)}.")
    return sentences


def report_title(runs: int, headlines: Sequence[str], recipes: Sequence[Sequence[Against]]) -> str:
    """The title of a report.

    Args:
        runs: how many runs it is of.
        headlines: the headline of each progressive run among them.
        recipes: of each different recipe, the comparisons with controls of equal FLOPs.
    """
    if not headlines:
        return f"{runs} run{'s' * (runs != 1)}, none of them progressive"
    if len(headlines) == 1:
        return headlines[0]
    if len(recipes) == 1:
        return f"At equal FLOPs growing ends {short_text(recipes[0])}"
    return f"At equal FLOPs growing {tally([overall(controls) for controls in recipes])}"


def headline(
    run: Run, gap: float | None, controls: Sequence[Against], speedup: float | None
) -> str:
    """The verdict on one run in one line.

    Args:
        gap: its final validation loss above the fixed-size run's, %.
        speedup: total FLOPs of the fixed-size run over this run's.
    """
    if not run.finished:
        return f"{run.name}: unfinished at step {run.last_step} of {run.config.last_step}"
    if not has_loss(run):
        return f"{run.name}: diverged"
    parts = []
    if gap is not None and speedup is not None:
        parts.append(f"{_saved(speedup, 'fewer')} FLOPs than fixed-size, loss {above(gap)} it")
    parts.append(short_text(controls))
    return f"{run.name}: {'; '.join(parts)}"


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
    """How the run ends against the short control; ``gap`` is in %."""
    if short is None or gap is None:
        return []
    return [
        f"At equal FLOPs it ends {above(gap)} the short control of "
        f"{short.config.train.steps:,} steps ({run.final_loss:.4f} against {short.final_loss:.4f})."
    ]


def _never_sentences(run: Run, never: Sequence[tuple[Run, float]]) -> list[str]:
    """How the run ends against each source that never grew; gaps are in %."""
    found = [
        f"{above(gap)} {depth_words(control.config)} that never grow, "
        f"{control.config.train.steps:,} steps ({run.final_loss:.4f} against "
        f"{control.final_loss:.4f})"
        for control, gap in never
    ]
    return [f"At equal FLOPs it ends {' and '.join(found)}."] if found else []


def _equal_sentence(equal: EqualLoss | None, fixed: Run) -> str:
    """Where the fixed-size run has the run's final loss, and what it has cost it by then."""
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
    """When the run mixed with the fixed-size run; no sentence where that could not be measured."""
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


def mixing_title(mixings: Sequence[MixingTime]) -> str:
    """The title of the picture of gaps: which runs mixed, or when the only one did."""
    if len(mixings) != 1:
        mixed = sum(mixing.mixed for mixing in mixings)
        return (
            f"{mixed} of {len(mixings)} runs mixed within {MIXED_PERCENT} % of fixed-size after τ"
        )
    if mixings[0].tokens is not None:
        return f"Mixed within {MIXED_PERCENT} % of fixed-size {_tokens(mixings[0])} after τ"
    left = f"{mixings[0].gap_left_percent:+.2f} %"
    return f"Not mixed within {MIXED_PERCENT} % of fixed-size after τ: {left} at the end"


def study_sentence(share: float | None, to_fixed: Against, controls: Sequence[Against]) -> str:
    """What a study found of one family at one size.

    Args:
        share: its total FLOPs over the fixed-size run's; None where there is none.
    """
    if to_fixed.mean is None or share is None:
        fixed = "against fixed-size: open, there is no finished one"
    else:
        fixed = (
            f"against fixed-size: {within(to_fixed)} ({100 * share:.0f} % of its FLOPs, "
            f"{evidence(to_fixed)})"
        )
    return f"{fixed}. {sentence(controls).removesuffix('.')}"


def within(to_fixed: Against) -> str:
    """Whether a run ends within the allowed gap of fixed-size, for fewer FLOPs: in words."""
    said = {BELOW: f"within {to_fixed.bound:g} %", NOT_BELOW: f"not within {to_fixed.bound:g} %"}
    return said.get(to_fixed.outcome, OPEN)


def study_title(
    name: str, controls: Sequence[Sequence[Against]], to_fixed: Sequence[Against]
) -> str:
    """What a study found, in one line.

    Args:
        name: the study's name.
        controls: of each different finding, the comparisons with controls of equal FLOPs.
        to_fixed: of each, the comparison with fixed-size training.
    """
    judged = [found for found in controls if any(one.mean is not None for one in found)]
    if not judged:
        return (
            f"{name}: no run that grows has a control of equal FLOPs yet, so whether growing pays "
            f"is open"
        )
    there = {one.control for found in judged for one in found if one.mean is not None}
    lacking = {one.control for found in judged for one in found} - there
    pairs = {len(one.values) for found in judged for one in found if one.mean is not None}
    lower = sum(all(one.mean < 0 for one in found if one.mean is not None) for found in judged)
    text = (
        f"{name}: at equal FLOPs growing {tally([overall(found) for found in judged])}, against "
        f"{' and '.join(sorted(there))}"
    ) + (f" (without {' and '.join(sorted(lacking))})" if lacking else "")
    if pairs == {1}:
        text += f" (one seed each; {lower} end below)"
    close = [one for one in to_fixed if one.mean is not None]
    if not close:
        return text
    outcomes = [one.outcome for one in close]
    text += (
        f"; for fewer FLOPs within {close[0].bound:g} % of fixed-size in {outcomes.count(BELOW)} "
        f"of {len(close)}"
    )
    return text + (f", open in {outcomes.count(OPEN)}" if OPEN in outcomes else "")


def _ratio(value: float) -> str:
    return f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def _saved(ratio: float, less: str) -> str:
    """``2.0x fewer``, or ``1.3x more`` where nothing was saved."""
    if abs(ratio - 1) < 0.05:
        return "as much" if less == "less" else "as many"
    return f"{_ratio(ratio)} {less}" if ratio >= 1 else f"{_ratio(1 / ratio)} more"


def _tokens(mixing: MixingTime) -> str:
    return f"{short_counts([mixing.tokens or 0])[0]} {mixing.unit}"
