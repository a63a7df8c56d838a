"""How far a finding is from a plan: the rule by which it counts for it, or only stands beside it.

A distance is in *octaves of tokens a parameter*: twice as many are one octave. What else differs
adds to it: another size one for each factor of 100, another family a half, experts in one of both
one, another kind of optimizer (or one that is not told) one. Tokens a parameter weigh most because
they decide which of two depths ends lower; that a finding carries over sizes is an assumption, and
the advice says by how much they differ.

Findings within :data:`NEAR` count for the answer where the growth is alike; those within
:data:`REACH` may name a factor and a τ to try.
"""

from __future__ import annotations

import math

from megatron_progressive.compare.advise.regime import Growth, Regime

NEAR, REACH = 2.0, 4.0
"""Octaves."""
SIZE_FACTOR = 100.0
"""The factor between sizes that counts as one octave."""
OTHER_FAMILY, OTHER_KIND, OTHER_OPTIMIZER = 0.5, 1.0, 1.0
ALIKE_FACTOR, ALIKE_TAU = 1.5, 0.2
"""Growth is alike where the factors of depth differ by no more than the one, and the last τ by no
more than the other."""


def parts(mine: Regime, other: Regime) -> list[tuple[float, str]]:
    """What separates two regimes, each with its octaves, the largest first. Without tokens a
    parameter there is no distance: it is infinite."""
    tokens, theirs = mine.tokens_per_param, other.tokens_per_param
    if tokens is None or theirs is None:
        return [(math.inf, "tokens a parameter are not told")]
    size = mine.params / other.params
    found = [
        (abs(math.log2(tokens / theirs)), f"{theirs:.3g} tokens a parameter"),
        (abs(math.log(size, SIZE_FACTOR)), size_text(size)),
        (OTHER_FAMILY * (mine.family != other.family), f"family {other.family}"),
        (
            OTHER_KIND * (mine.experts != other.experts),
            "experts" if other.experts else "no experts",
        ),
        (
            OTHER_OPTIMIZER * (mine.optimizer != other.optimizer),
            f"optimizer {other.optimizer or 'not told'}",
        ),
    ]
    return sorted(found, key=lambda one: -one[0])


def distance(mine: Regime, other: Regime) -> float:
    """The octaves between two regimes."""
    return round(sum(octaves for octaves, _ in parts(mine, other)), 9)


def number_text(value: float) -> str:
    """A number as one says it: ``4.4``, ``41.7``, ``2,100``."""
    return f"{value:.3g}" if value < 100 else f"{float(f'{value:.2g}'):,.0f}"


def size_text(ratio: float) -> str:
    """How the other model stands to one ``ratio`` times its size: ``3,900 times smaller``."""
    times = max(ratio, 1 / ratio)
    if times < 1.25:
        return "about as large"
    shown = f"{times:.2g}" if times < 10 else number_text(float(f"{times:.2g}"))
    return f"{shown} times {'smaller' if ratio > 1 else 'larger'}"


def alike(mine: Growth | None, other: Growth | None) -> bool:
    """Whether two runs grow alike: both from no layers or both from some, in one step or several
    each, by about the same factor and at about the same τ. A plan that does not grow yet asks for
    any growth."""
    if mine is None or other is None:
        return mine is None
    if (len(mine.taus) > 1) != (len(other.taus) > 1):
        return False
    if abs(mine.taus[-1] - other.taus[-1]) > ALIKE_TAU + 1e-9:
        return False
    if mine.factor is None or other.factor is None:
        return mine.factor is other.factor
    ratio = mine.factor / other.factor
    return max(ratio, 1 / ratio) <= ALIKE_FACTOR + 1e-9
