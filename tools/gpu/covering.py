"""Few cases in which every two values of different factors meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

Case = Mapping[str, str]
"""A value of each factor, by the factor's name."""
Pair = tuple[tuple[str, str], tuple[str, str]]
"""Two factors, each with a value."""


def pairs_of(case: Case) -> list[Pair]:
    """The pairs of values that meet in a case."""
    return list(combinations(case.items(), 2))


def covering(
    factors: Mapping[str, Sequence[str]], possible: Callable[[Case], bool]
) -> tuple[list[Case], list[Pair]]:
    """Cases in which all pairs of values meet that can: each next one is that with the most pairs
    that have not met yet, and of several the first in the order of the factors' values. The same
    factors give the same cases.

    Args:
        factors: of each its values.
        possible: whether there is such a case.

    Returns: the cases, and the pairs that meet in no possible case.
    """
    every = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    bits: dict[Pair, int] = {}  # of each pair one, so that sets of pairs are numbers
    masks = [sum(1 << bits.setdefault(p, len(bits)) for p in pairs_of(case)) for case in every]
    able = [(case, mask) for case, mask in zip(every, masks, strict=True) if possible(case)]
    left = 0
    for _, mask in able:
        left |= mask
    impossible = [pair for pair, bit in bits.items() if not left >> bit & 1]
    chosen: list[Case] = []
    while left:
        case, mask = max(able, key=lambda one: (one[1] & left).bit_count())
        chosen.append(case)
        left &= ~mask
    return chosen, impossible
