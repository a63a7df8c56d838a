"""The crossing of two depths: planted laws cross where they were planted to."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq

from megatron_progressive.config import ConfigError
from megatron_progressive.laws.crossing import Crossing, find_crossing

SHALLOW, DEEP = (2.20, 1.0e6), (2.00, 2.2e6)
"""Loss that never falls below, and FLOPs a token, of two depths."""
B, BETA = 30.0, 0.22
BUDGETS = np.geomspace(2e12, 6.4e13, 6)


def loss(depth: tuple[float, float], compute: np.ndarray) -> np.ndarray:
    """``E + B / D^beta`` with the tokens that ``compute`` pays for."""
    floor, flops = depth
    return floor + B / (compute / flops) ** BETA


def planted(floor: float = SHALLOW[0]) -> float:
    def apart(log: float) -> float:
        compute = np.exp(log)
        return float(loss((floor, SHALLOW[1]), compute) - loss(DEEP, compute))

    return float(np.exp(brentq(apart, 10, 60)))


def draw(seed: int, noise: float, seeds: int = 3, floor: float = SHALLOW[0]) -> Crossing:
    """Pairs of ``seeds`` seeds at each budget; a pair's two runs share half of their noise."""
    random = np.random.default_rng(seed)
    compute = np.repeat(BUDGETS, seeds)
    shared = noise * random.standard_normal(len(compute))
    own = noise * random.standard_normal((2, len(compute)))
    return find_crossing(
        compute,
        loss((floor, SHALLOW[1]), compute) + shared + own[0],
        loss(DEEP, compute) + shared + own[1],
    )


def test_without_noise_the_planted_crossing_comes_back() -> None:
    assert BUDGETS[0] < planted() < BUDGETS[-1]
    assert draw(0, 0.0).compute.value == pytest.approx(planted(), rel=0.05)


def test_the_planted_crossing_is_inside_the_interval_in_80_to_97_of_100() -> None:
    known = planted()
    found = [draw(seed, 0.02) for seed in range(100)]
    inside = [(c.compute.low or 0.0) <= known <= (c.compute.high or np.inf) for c in found]
    assert 80 <= sum(inside) <= 97
    # and the interval says something: most have both ends
    assert sum(c.compute.low is not None and c.compute.high is not None for c in found) > 50


def test_more_noise_opens_the_interval() -> None:
    quiet, loud = (draw(5, noise).compute for noise in (0.005, 0.05))
    assert quiet.low is not None
    assert quiet.high is not None
    width = np.log(quiet.high / quiet.low)
    ends = (loud.low or BUDGETS[0], loud.high or BUDGETS[-1])
    assert np.log(ends[1] / ends[0]) > 2 * width


@pytest.mark.parametrize(("floor", "lower"), [(2.6, "deep"), (1.7, "shallow")])
def test_depths_that_do_not_cross_say_which_is_lower(floor: float, lower: str) -> None:
    found = draw(1, 0.002, floor=floor)
    assert found.compute.value is None
    assert found.lower == lower


def test_noise_that_hides_both_says_so() -> None:
    found = [draw(seed, 0.3, floor=2.45) for seed in range(40)]
    assert sum(c.compute.low is None or c.compute.high is None for c in found) > 30
    nowhere = [c for c in found if c.compute.value is None]
    assert sum(c.lower == "neither" for c in nowhere) > 0.8 * len(nowhere) > 4


def test_the_zero_beyond_which_depth_is_ahead_counts() -> None:
    """Of a difference that falls through zero and rises through it again, where it rises."""
    compute = np.geomspace(1e12, 1e14, 9)
    x = np.log10(compute) - 12
    difference = (x - 0.3) * (x - 1.5)
    found = find_crossing(compute, 3 + difference, np.full(9, 3.0))
    assert found.compute.value == pytest.approx(10**13.5, rel=1e-3)


@pytest.mark.parametrize(
    ("compute", "losses", "line"),
    [
        ([1e12, 2e12, 2e12], [3.0] * 3, "got 2 distinct budgets; accepted: at least 3"),
        ([1e12, 2e12, 0.0, 8e12], [3.0] * 4, "a compute that is none"),
        ([1e12, 2e12, 4e12], [3.0, float("nan"), 3.0], "a loss that is none"),
        ([1e12, 2e12, 4e12], [3.0, 3.0], "one loss of each depth a budget"),
    ],
)
def test_what_cannot_be_told_is_refused(
    compute: list[float], losses: list[float], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        find_crossing(compute, losses, losses)
