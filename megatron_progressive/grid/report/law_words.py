"""What a study's laws predict and save, in words; and why, where they do not say it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_progressive.grid.report.figures import factor_text
from megatron_progressive.grid.report.laws import Prediction, Saving
from megatron_progressive.laws.efficiency import Multiplier
from megatron_progressive.laws.fits import LEVEL, Interval

NO_LAW = "no law"


def prediction_lines(found: Sequence[Prediction]) -> list[str]:
    """One sentence for each family whose largest size is predicted, and one for each reason why
    others are not."""
    lines = [
        f"{one.family}: a law of {one.rollout.cells} cells of the smaller sizes predicts "
        f"{number_text(one.rollout.predicted.value)} at {one.size}, measured is "
        f"{one.rollout.measured:.4f} (error {error_text(one)}, {_range(one)})."
        for one in found
        if one.rollout is not None
    ]
    reasons: dict[str, list[str]] = {}
    for one in found:
        if one.rollout is None:
            reasons.setdefault(one.refused, []).append(one.family)
    whole = f"any of the {len(found)} kinds of run"
    return lines + [
        f"The largest size is not predicted from the smaller ones for "
        f"{whole if len(families) == len(found) > 1 else ', '.join(families)}: {reason}."
        for reason, families in reasons.items()
    ]


def number_text(value: float | None) -> str:
    """A loss with four digits behind the point; ``open`` where it is no number."""
    return "open" if value is None else f"{value:.4f}"


def error_text(one: Prediction) -> str:
    """How far the prediction is from what was measured: ``+0.31 %`` where it is too high."""
    error = None if one.rollout is None else one.rollout.error_percent
    return "–" if error is None else f"{error:+.2f} %"


def inside_text(one: Prediction) -> str:
    """Whether the measured loss is inside the interval of the prediction."""
    inside = None if one.rollout is None else one.rollout.inside
    return "open" if inside is None else "inside" if inside else "outside"


def _range(one: Prediction) -> str:
    assert one.rollout is not None
    low, high = one.rollout.predicted.low, one.rollout.predicted.high
    where = f"the {100 * LEVEL:.0f} % interval {number_text(low)} to {number_text(high)}"
    if one.rollout.inside is None:
        return f"of {where}"
    return f"{inside_text(one)} {where}"


def interval_factor(found: Interval) -> str:
    """The text of a factor and its interval. An end that is a power of ten which no run could have
    is given without a number."""
    value, low, high = (
        "open" if number is None else factor_text(number) if number else "0"
        for number in (found.value, found.low, found.high)
    )
    return f"{value} ({low} to {high})"


def between_text(found: Multiplier) -> str:
    """The multiplier without a law, a bound of it, or why there is neither."""
    if found.value is not None:
        return factor_text(found.value)
    if found.at_least is not None:
        return f"above {factor_text(found.at_least)}: {found.why}"
    if found.at_most is not None:
        return f"below {factor_text(found.at_most)}: {found.why}"
    return f"none: {found.why}"


def law_text(one: Saving) -> str:
    """The factor by the laws."""
    return NO_LAW if one.efficiency is None else interval_factor(one.efficiency.factor)


def saving_lines(found: Sequence[Saving]) -> list[str]:
    """The factors of the largest size, one line for each family and reference."""
    largest = max((one.params for one in found), default=0)
    return [
        f"{one.family} at {one.size}, FLOPs of {one.reference} over its own at equal loss: by the "
        f"laws {law_text(one)}, between cells without a law {between_text(one.between)}"
        for one in found
        if one.params == largest
    ]
