"""Whether growing pays, as pairs of runs decide; :mod:`.verdict_words` puts it into words.

One run says nothing of the next seed: two seeds of one recipe differ by about as much as growing is
said to gain. So what decides is the *paired* difference: the final loss of a run that grows above
that of its control, in %, where both have the same seed and with it the same order of data. One
pair leaves the question open, whatever its difference. From two pairs on the 95 % interval of the
mean difference (Student's t) decides; where that interval has both signs, the question is open as
well.

Growing pays where it ends below *every* control of equal FLOPs (:data:`.arms.EQUAL_FLOPS`): the
short control and the source that is never grown. Each of them has to be beaten on its own, which
keeps the level of the test (an intersection-union test; Berger 1982, Technometrics 24); ending
above one of them decides against growing, and without one of them nothing is said to pay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import nct
from scipy.stats import t as student

from megatron_progressive.laws.fits import LEVEL

PAYS, DOES_NOT_PAY, OPEN = "pays", "does not pay", "open"
BELOW, NOT_BELOW = "below", "not below"

LEVEL_PERCENT = 0.005
"""A difference below this, in %, is none: it rounds to 0.00 %."""

POWER = 0.8
"""The chance of finding a difference that is there, for which the number of pairs is stated."""

MOST_PAIRS = 10_000
"""The largest number of pairs that is stated as needed."""


@dataclass(frozen=True)
class Against:
    """The final losses of a run that grows against one control, over pairs of one seed each."""

    control: str
    bound: float
    """What the difference has to be below, in %: 0, or the gap that is allowed."""
    seeds: list[int]
    """The seeds of the pairs."""
    values: list[float]
    """The final validation loss above (+) or below (-) the control's, in %, of each pair."""
    mean: float | None
    """The mean difference, in %; None without a pair."""
    low: float | None
    """The lower end of the mean's interval by Student's t, in %; None for fewer than two pairs."""
    high: float | None
    spread: float | None
    """The standard deviation between pairs, in %; None for fewer than two pairs."""
    pairs_needed: int | None
    """The number of pairs with which a difference from the bound as large as the mean's would be
    found with 80 % power at this spread. None where there is no spread, or where it takes more than
    10,000."""
    outcome: str
    """What the pairs decide: ``below``, ``not below`` or ``open``."""
    left_out: list[str] = field(default_factory=list)
    """The seeds that are in no pair, and why."""
    lacking: list[str] = field(default_factory=list)
    """The parts of the control that are missing while others are in the pairs."""


def pairs_needed(difference: float, spread: float) -> int | None:
    """The number of pairs with which a two-sided paired t-test finds a mean difference with 80 %
    power.

    With n pairs the statistic has a noncentral t distribution of n - 1 degrees of freedom around
    ``sqrt(n) * difference / spread`` (Cohen 1988, Statistical Power Analysis for the Behavioral
    Sciences, chapter 2). The result is the least n that has this power.

    Args:
        difference: the mean difference; ``spread`` is the standard deviation of single differences.

    Returns:
        The number of pairs, or None where nothing can be said: without a difference, without a
            spread, or with more than 10,000 pairs.
    """
    if difference == 0 or spread <= 0:
        return None
    effect = abs(difference) / spread

    def found(pairs: int) -> bool:
        critical, centre = student.ppf((1 + LEVEL) / 2, pairs - 1), effect * math.sqrt(pairs)
        upper = nct.sf(critical, pairs - 1, centre)
        lower = np.nan_to_num(nct.cdf(-critical, pairs - 1, centre))  # far from the centre: none
        return bool(upper + lower >= POWER)

    if not found(MOST_PAIRS):
        return None
    low, high = 1, MOST_PAIRS  # power grows with pairs
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def against(
    control: str, gaps: Sequence[tuple[int, float]], bound: float = 0.0,
    left_out: Sequence[str] = (), diverged: bool = False, lacking: Sequence[str] = (),
) -> Against:  # fmt: skip
    """Decide between a run that grows and one control.

    Args:
        control: the name of the control.
        gaps: the seed and the gap in % of each pair; several pairs of one seed count as one, their
            mean.
        bound: what the difference has to be below, in %.
        left_out: the seeds that are in no pair, and why.
        diverged: whether a run that grows is among these because it diverged; the other pairs then
            do not show that growing ends below.
        lacking: the parts of the control that are missing; without them the pairs may show that
            growing does not end below, but not that it does.
    """
    by_seed: dict[int, list[float]] = {}
    for seed, gap in gaps:
        by_seed.setdefault(seed, []).append(gap)
    values = [float(np.mean(same)) for same in by_seed.values()]
    mean = float(np.mean(values)) if values else None
    low = high = spread = needed = None
    outcome = OPEN
    if mean is not None and len(values) > 1:
        spread = float(np.std(values, ddof=1))
        half = float(student.ppf((1 + LEVEL) / 2, len(values) - 1)) * spread / len(values) ** 0.5
        low, high = mean - half, mean + half
        needed = pairs_needed(mean - bound, spread)
        margin = LEVEL_PERCENT if bound == 0 else 0.0
        # without any spread there is no t: runs of one seed under several names look like that
        if spread > 0 and high <= bound - margin and not diverged and not lacking:
            outcome = BELOW
        elif spread > 0 and low > bound - margin:
            outcome = NOT_BELOW
    return Against(
        control, bound, list(by_seed), values, mean, low, high, spread, needed, outcome,
        list(left_out), list(lacking),
    )  # fmt: skip


def overall(controls: Sequence[Against]) -> str:
    """What all controls decide together: ``pays`` where growing ends below every one of them,
    ``does not pay`` where it is known not to end below one of them, and otherwise ``open``."""
    outcomes = [one.outcome for one in controls]
    if NOT_BELOW in outcomes:
        return DOES_NOT_PAY
    return PAYS if outcomes and set(outcomes) == {BELOW} else OPEN
