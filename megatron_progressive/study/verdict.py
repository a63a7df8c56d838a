"""What a comparison says, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from megatron_progressive.config import ConfigError
from megatron_progressive.data import differ
from megatron_progressive.study.arms import Comparison
from megatron_progressive.study.gaps import MIXED_PERCENT, gap_percent
from megatron_progressive.study.mixing import MixingTime, mixing_time
from megatron_progressive.study.plan_text import short_counts
from megatron_progressive.study.runs import Run

WORSE_PERCENT = 5.0
"""Final gap to fixed-size, in %, from which the run counts as failed (arXiv 2511.04981)."""

LEVEL_PERCENT = 0.005  # rounds to 0.00 %


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
    """Final validation loss above (+: it loses) or below (-: it wins) the short control's, %."""
    beats_short: bool | None
    equal_loss: EqualLoss | None
    mixing: MixingTime | None
    """None as well where too few validations follow the expansion."""
    headline: str
    """The finding in one line."""
    verdict: str
    """The finding in full sentences."""
    sentences: list[str] = field(default_factory=list)


def percent(value: float) -> str:
    """A magnitude in %, with the digits that matter."""
    value = abs(value)
    return f"{value:.2f} %" if value < 1 else f"{value:.1f} %"


def _ratio(value: float) -> str:
    return f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def _tokens(mixing: MixingTime) -> str:
    return f"{short_counts([mixing.tokens or 0])[0]} {mixing.unit}"


def _saved(ratio: float, less: str) -> str:
    """``2.0x fewer``, or ``1.3x more`` where nothing was saved."""
    if abs(ratio - 1) < 0.05:
        return "as much" if less == "less" else "as many"
    return f"{_ratio(ratio)} {less}" if ratio >= 1 else f"{_ratio(1 / ratio)} more"


def verdicts(comparisons: Sequence[Comparison]) -> list[Verdict]:
    """The verdict of each comparison."""
    return [_verdict(comparison, _seeds(comparison, comparisons)) for comparison in comparisons]


def _recipe(run: Run) -> str:
    return repr({k: v for k, v in asdict(run.config).items() if k != "run"})


def _seeds(comparison: Comparison, comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The finished comparisons of the same recipe, one a seed."""
    recipe = _recipe(comparison.progressive)
    data = comparison.progressive.trained_on
    same = [
        c
        for c in comparisons
        if c.progressive.finished
        and _recipe(c.progressive) == recipe
        and not differ(c.progressive.trained_on, data)
    ]
    return list({c.progressive.config.run.seed: c for c in same}.values())


def _verdict(comparison: Comparison, seeds: list[Comparison]) -> Verdict:
    run, fixed, short = comparison.progressive, comparison.fixed, comparison.short
    loss = run.final_loss
    usable = loss is not None and math.isfinite(loss)
    gap = _gap(run, fixed)
    short_gap = _gap(run, short)
    speedup = _quotient(fixed.total_flops if fixed else None, run.total_flops)
    wall = _quotient(fixed.train_wall if fixed else None, run.train_wall)
    equal = _equal_loss(run, fixed) if fixed and usable else None
    mixing, untold = _mixing(run, fixed) if fixed and usable else (None, "")
    missing = [f"{m.arm} ({m.reason})" for m in comparison.missing]
    sentences = []
    if not run.finished:
        sentences.append(f"Unfinished: step {run.last_step} of {run.config.last_step}.")
    elif not usable:
        sentences.append("Diverged: its final validation loss is not a number.")
    if missing:
        sentences.append(f"Incomplete: no {' and no '.join(missing)}.")
    sentences += _fixed_sentences(run, fixed, gap, speedup, wall)
    sentences += _short_sentences(run, short, short_gap)
    if fixed is not None and usable:
        sentences.append(_equal_sentence(equal, fixed))
    sentences += _mixing_sentences(mixing) or [untold] * bool(untold)
    sentences += _seed_sentences(run, seeds)
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
        beats_short=None if short_gap is None else short_gap < -LEVEL_PERCENT,
        equal_loss=equal,
        mixing=mixing,
        headline=_headline(run, gap, short_gap, speedup, usable),
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


def _above(gap: float) -> str:
    if abs(gap) < LEVEL_PERCENT:
        return "level with"
    return f"{percent(gap)} {'above' if gap > 0 else 'below'}"


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
    ends = f"It ends at {run.final_loss:.4f}, {_above(gap)} fixed-size ({fixed.final_loss:.4f})"
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
    losses = f"({run.final_loss:.4f} against {short.final_loss:.4f})"
    steps = f"{short.config.train.steps:,} steps"
    if abs(gap) < LEVEL_PERCENT:
        return [f"At equal FLOPs it ends level with the short control, {steps} {losses}."]
    if gap < 0:
        return [
            f"At equal FLOPs progressive training wins: {percent(gap)} below the short control "
            f"of {steps} {losses}."
        ]
    return [
        f"At equal FLOPs progressive training LOSES to the short control by {percent(gap)} "
        f"{losses}: {steps} of the full depth from scratch were the better use of this compute."
    ]


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


def _seed_sentences(run: Run, seeds: list[Comparison]) -> list[str]:
    if len(seeds) < 2:
        return ["One seed: differences as small as those between seeds cannot be told."]
    found = [f"{len(seeds)} seeds."]
    for name, pairs in (
        ("fixed-size", [(c.progressive, c.fixed) for c in seeds]),
        ("the short control", [(c.progressive, c.short) for c in seeds]),
    ):
        gaps = [gap for mine, control in pairs if (gap := _gap(mine, control)) is not None]
        if len(gaps) > 1:
            found.append(
                f"Gap to {name} over {len(gaps)} seeds: mean {np.mean(gaps):+.2f} %, from "
                f"{min(gaps):+.2f} to {max(gaps):+.2f} %."
            )
    return found


def _headline(
    run: Run, gap: float | None, short_gap: float | None, speedup: float | None, usable: bool
) -> str:
    if not run.finished:
        return f"{run.name}: unfinished at step {run.last_step} of {run.config.last_step}"
    if not usable:
        return f"{run.name}: diverged"
    parts = []
    if gap is not None and speedup is not None:
        parts.append(f"{_saved(speedup, 'fewer')} FLOPs than fixed-size, loss {_above(gap)} it")
    if short_gap is None:
        parts.append("no short control: what the saving is worth is open")
    elif abs(short_gap) < LEVEL_PERCENT:
        parts.append("level with the short control")
    else:
        outcome = "beats" if short_gap < 0 else "loses to"
        parts.append(f"{outcome} the short control by {percent(short_gap)}")
    return f"{run.name}: {'; '.join(parts)}"
