"""Predicting the largest size, and the compute multiplier without a law."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_progressive.config import ConfigError
from megatron_progressive.laws.efficiency import interpolated_factor
from megatron_progressive.laws.fits import Interval
from megatron_progressive.laws.rollout import Rollout, rollout

COMPUTE = np.geomspace(1e15, 1e18, 7)


def law(compute: np.ndarray, cheaper: float = 1.0) -> np.ndarray:
    return 1.7 + 900 / (cheaper * compute) ** 0.17


def test_a_law_that_holds_predicts_the_largest_size() -> None:
    found = rollout(COMPUTE, law(COMPUTE), COMPUTE / 1e10, draws=20)
    assert found.cells == 6
    assert found.compute == pytest.approx(COMPUTE[-1])
    assert found.error_percent == pytest.approx(0.0, abs=0.05)


def test_a_law_that_breaks_off_is_found_out() -> None:
    loss = law(COMPUTE)
    loss[-1] *= 1.1  # the largest size does not keep to it
    found = rollout(COMPUTE, loss, COMPUTE / 1e10, draws=20)
    assert found.error_percent == pytest.approx(100 * (1 / 1.1 - 1), abs=0.1)
    assert found.predicted.high is not None
    assert found.predicted.high < found.measured


def test_too_few_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 3 distinct computes"):
        rollout(COMPUTE[:4], law(COMPUTE[:4]), COMPUTE[:4])


@pytest.mark.parametrize("cheaper", [0.5, 1.0, 2.5])
def test_the_known_factor_comes_back_without_a_law(cheaper: float) -> None:
    fine = np.geomspace(1e15, 1e18, 60)
    found = interpolated_factor(fine, law(fine, cheaper), fine, law(fine), 3e16)
    assert found.value == pytest.approx(cheaper, rel=0.01)
    assert (found.at_least, found.at_most, found.why) == (None, None, "")


def test_seeds_are_averaged_and_bumps_levelled() -> None:
    compute = np.repeat(COMPUTE, 2)
    noise = np.tile([0.01, -0.01], 7)
    found = interpolated_factor(
        compute, law(compute) * np.exp(noise), COMPUTE, law(COMPUTE), COMPUTE[3]
    )
    assert found.value == pytest.approx(1.0, rel=1e-6)
    bumpy = law(COMPUTE)
    bumpy[3] = bumpy[2] * 1.01  # ended higher than a smaller budget
    found = interpolated_factor(COMPUTE, bumpy, COMPUTE, law(COMPUTE), COMPUTE[2])
    assert found.value is not None


def test_outside_of_what_was_measured_there_is_a_bound_or_none() -> None:
    here = COMPUTE, law(COMPUTE)
    beyond = interpolated_factor(*here, *here, 1e19)
    assert (beyond.value, beyond.at_least, beyond.at_most) == (None, None, None)
    assert "no cells around" in beyond.why
    # it needs a 1,000th of the FLOPs: at its fewest, which are the reference's, it is lower already
    cheap = interpolated_factor(COMPUTE, law(COMPUTE, 1e3), *here, COMPUTE[2])
    assert cheap.value is None
    assert cheap.at_least == pytest.approx(COMPUTE[2] / COMPUTE[0])
    assert "below that loss at its fewest" in cheap.why
    dear = interpolated_factor(COMPUTE, law(COMPUTE, 1e-3), *here, COMPUTE[-2])
    assert dear.value is None
    assert dear.at_most == pytest.approx(COMPUTE[-2] / COMPUTE[-1])
    assert "above that loss at its most" in dear.why
    alone = interpolated_factor(COMPUTE[:1], law(COMPUTE[:1]), *here, COMPUTE[0])
    assert "one number of FLOPs" in alone.why
    assert "no cell" in interpolated_factor([], [], *here, COMPUTE[0]).why


def test_whether_the_largest_size_is_inside_is_told_by_the_interval() -> None:
    for measured, low, high, inside in (
        (2.5, 2.4, 2.6, True), (2.7, 2.4, 2.6, False), (2.3, 2.4, 2.6, False),
        (2.5, None, 2.6, None), (2.5, 2.4, None, None),
    ):  # fmt: skip
        assert Rollout(1e18, measured, Interval(2.5, low, high), 4).inside is inside
