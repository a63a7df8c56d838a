"""Which part of a mixture each draw is from: a function of the draw's number, the weights and the
sizes of the parts.

As in Megatron's blended data sets, parts are interleaved so that their numbers of draws follow the
weights all along, not on average. Megatron-core's own rule (``helpers.cpp``,
``build_blending_indices``) may be more than one draw off with three parts or more, and it walks
through all draws before the first one that is asked for. Here the rule is Tijdeman's ("The chairman
assignment problem", Discrete Mathematics 32, 1980), which never is as much as one draw off, over
weights in whole numbers: after their sum everything begins anew, so that any draw is looked up at
once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

LONGEST_PERIOD = 100_000
"""The most draws after which a blend begins anew; the shares of parts count to one over this."""


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers in the same proportions, whose sum is :data:`LONGEST_PERIOD` at
    most. Decimal fractions keep their exact proportions; where those need a larger sum, the numbers
    are the nearest ones that add up.

    Args:
        weights: numbers above 0, no share of which is below 1 / :data:`LONGEST_PERIOD`.
    """
    exact = [Fraction(Decimal(repr(float(weight)))) for weight in weights]
    total = sum(exact)
    shares = [one / total for one in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    found = [max(1, math.floor(share * LONGEST_PERIOD)) for share in shares]
    order = sorted(range(len(found)), key=lambda k: found[k] - shares[k] * LONGEST_PERIOD)
    for part in order[: LONGEST_PERIOD - sum(found)]:
        found[part] += 1
    return found


def blended(counts: Sequence[int]) -> NDArray[np.int64]:
    """The parts of one period of draws: part k ``counts[k]`` times, so that after n draws it has
    been drawn within 1 - 1 / (2 K - 2) of n times its share, of K parts (Tijdeman 1980)."""
    period, parts = sum(counts), range(len(counts))
    if len(counts) == 1:
        return np.zeros(period, dtype=np.int64)
    slack = 2 * len(counts) - 2
    behind = [0] * len(counts)  # n times the share minus the draws, times the period
    found = np.empty(period, dtype=np.int64)
    for number in range(period):
        chosen, least = -1, math.inf
        for part in parts:
            behind[part] += counts[part]
            if slack * behind[part] >= period:  # may be drawn; the one with the first deadline is
                deadline = ((slack - 1) * period - slack * behind[part]) / counts[part]
                if deadline < least:
                    chosen, least = part, deadline
        behind[chosen] -= period
        found[number] = chosen
    return found


@dataclass(frozen=True)
class _Stretch:
    """Draws between which the same parts are blended with the same weights."""

    first: int
    """The number of its first draw."""
    parts: NDArray[np.int64]
    """The part of each draw of a period."""
    ranks: NDArray[np.int64]
    """How many draws of the same part the period has before each."""
    counts: NDArray[np.int64]
    """How often each part is drawn in a period."""
    before: NDArray[np.int64]
    """How often each part has been drawn before the stretch."""

    def number_of(self, part: int, draw: int) -> int:
        """The number, from the start of the run, of a part's ``draw``-th draw from the start of the
        run, were the stretch to go on so far."""
        periods, rank = divmod(draw - int(self.before[part]), int(self.counts[part]))
        place = np.flatnonzero(self.parts == part)[rank]
        return self.first + periods * len(self.parts) + int(place)

    def drawn(self, until: int) -> NDArray[np.int64]:
        """How often each part has been drawn before draw ``until`` of the stretch."""
        periods, rest = divmod(until - self.first, len(self.parts))
        partly = np.bincount(self.parts[:rest], minlength=len(self.counts))
        found: NDArray[np.int64] = self.before + periods * self.counts + partly
        return found


class Blend:
    """The parts and their draws in the order of a mixture."""

    def __init__(self, weights: Sequence[float], at_most: Sequence[int | None]) -> None:
        """Args:
        weights: of each part, above 0.
        at_most: how many draws of each part there may be; None for any number. From the first
            draw that would be of a used-up part on, the other weights count among themselves.
        """
        self.parts = len(weights)
        self.used_up: dict[int, int] = {}
        """The parts that are used up, each with the number of the first draw without it."""
        self.total: int | None = None
        """How many draws there are; None where they have no end."""
        self._stretches: list[_Stretch] = []
        left = [k for k in range(len(weights)) if at_most[k] != 0]
        self.used_up = {k: 0 for k in range(len(weights)) if at_most[k] == 0}
        first, before = 0, np.zeros(len(weights), dtype=np.int64)
        while left:
            stretch = _stretch(first, left, weights, before)
            self._stretches.append(stretch)
            ends = {k: stretch.number_of(k, most) for k in left if (most := at_most[k]) is not None}
            if not ends:
                return
            part = min(ends, key=lambda k: ends[k])
            first = ends[part]
            before = stretch.drawn(first)
            left.remove(part)
            self.used_up[part] = first
        self.total = first

    def drawn(self, until: int) -> list[int]:
        """How often each part is drawn before draw ``until``.

        Raises:
            IndexError: there are fewer draws.
        """
        if self.total is not None and until > self.total:
            raise IndexError(f"draw {until} of {self.total}")
        within = [stretch for stretch in self._stretches if stretch.first <= until]
        return [int(n) for n in within[-1].drawn(until)] if within else [0] * self.parts

    def locate(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The part of each draw, and the number of that draw among those of its part.

        Raises:
            IndexError: there are fewer draws.
        """
        if self.total is not None and numbers.size and numbers.max() >= self.total:
            raise IndexError(f"draw {numbers.max()} of {self.total}")
        parts, draws = np.empty_like(numbers), np.empty_like(numbers)
        firsts = np.array([stretch.first for stretch in self._stretches])
        which = np.searchsorted(firsts, numbers, side="right") - 1
        for index in np.unique(which):
            mine, stretch = which == index, self._stretches[index]
            periods, places = np.divmod(numbers[mine] - stretch.first, len(stretch.parts))
            part = stretch.parts[places]
            parts[mine] = part
            draws[mine] = (
                stretch.before[part] + periods * stretch.counts[part] + stretch.ranks[places]
            )
        return parts, draws


def _stretch(
    first: int, left: Sequence[int], weights: Sequence[float], before: NDArray[np.int64]
) -> _Stretch:
    counts = np.zeros(len(weights), dtype=np.int64)
    counts[left] = whole_weights([weights[k] for k in left])
    parts = np.asarray(left, dtype=np.int64)[blended([int(counts[k]) for k in left])]
    ranks = np.empty_like(parts)
    for part in left:
        mine = parts == part
        ranks[mine] = np.arange(np.count_nonzero(mine))
    return _Stretch(first, parts, ranks, counts, before)
