"""Scaling-law fits: known laws come back, also with noise and outliers, and agree with another
optimiser; what cannot be fitted is refused."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.special import huber
from scipy.stats import binom

from megatron_progressive.config import ConfigError
from megatron_progressive.laws.efficiency import (
    efficiency_at_compute,
    efficiency_at_loss,
    pareto,
)
from megatron_progressive.laws.fits import (
    LEVEL,
    Interval,
    fit_compute,
    fit_size_tokens,
    predict,
)
from megatron_progressive.laws.solver import DELTA, LARGEST_EXPONENT

COMPUTE = np.logspace(17, 20, 12)
E, A, ALPHA = 1.7, 900.0, 0.15


def law(compute: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """A law, for an arm that needs ``factor`` times less compute for any loss."""
    return E + A / (factor * compute) ** ALPHA


def noisy(seed: int, scale: float = 0.004) -> np.ndarray:
    random = np.random.default_rng(seed)
    return law(COMPUTE) * np.exp(scale * random.standard_normal(len(COMPUTE)))


def test_a_law_without_noise_comes_back() -> None:
    fit = fit_compute(COMPUTE, law(COMPUTE), draws=3)
    for name, known in (("E", E), ("A", A), ("alpha", ALPHA)):
        assert fit.parameters[name].value == pytest.approx(known, rel=2e-3)
    assert fit.rms_log_residual < 1e-6
    assert not fit.notes
    assert predict(fit, 1e22).value == pytest.approx(float(law(np.array(1e22))), rel=1e-3)


def test_it_is_the_optimum_of_another_method() -> None:
    """Bend the law so that no parameters fit it exactly: both must then agree on the best."""
    loss = law(COMPUTE) * (1 + 2e-4 * np.sin(np.arange(len(COMPUTE))))  # within delta: squares
    logs = np.log(COMPUTE)

    def residual(theta: np.ndarray) -> np.ndarray:
        return np.log(np.exp(theta[0]) + np.exp(theta[1] - theta[2] * (logs - logs.mean()))) - (
            np.log(loss)
        )

    wanted = least_squares(residual, [0.5, 0.1, 0.2], xtol=1e-15, ftol=1e-15, gtol=1e-15).x
    fit = fit_compute(COMPUTE, loss, draws=0)
    assert fit.parameters["E"].value == pytest.approx(np.exp(wanted[0]), rel=1e-4)
    assert fit.parameters["alpha"].value == pytest.approx(wanted[2], rel=1e-4)


def test_intervals_cover_as_often_as_they_say() -> None:
    """Also with as few cells as a study has; the factor between two arms of one law is 1. Fewer
    than ``least`` of 80 have a chance of 1 % where 95 % are covered, and of 97 % where 80 % are."""
    covered, seeds = {"E": 0, "alpha": 0, "factor": 0}, 80
    least = int(binom.ppf(0.01, seeds, LEVEL))
    assert binom.cdf(least - 1, seeds, 0.8) > 0.95
    compute = COMPUTE[::2]
    for seed in range(seeds):
        fit, other = (
            fit_compute(compute, noisy(one)[::2], draws=40, seed=3) for one in (seed, 900 + seed)
        )
        factor = efficiency_at_compute(fit, other, 3e18).factor
        for name, found, known in (
            ("E", fit.parameters["E"], E),
            ("alpha", fit.parameters["alpha"], ALPHA),
            ("factor", factor, 1.0),
        ):
            assert found.low is not None
            covered[name] += found.low <= known and (found.high is None or known <= found.high)
    assert min(covered.values()) >= least, covered


def test_noisy_cells_reach_the_optimum_of_another_method_and_soon() -> None:
    """Beyond delta the objective is hardly smooth, which is where minimisers crawl."""
    random = np.random.default_rng(0)
    compute = np.array([1e15, 3e15, 1e16, 3e16])
    loss = 2 + 50 / compute**0.1 + random.normal(0, 0.05, 4)
    started = time.process_time()
    fit = fit_compute(compute, loss)
    assert time.process_time() - started < 5
    logs = np.log(compute) - np.log(compute).mean()

    def residual(theta: np.ndarray) -> np.ndarray:
        return np.logaddexp(theta[0], theta[1] - theta[2] * logs) - np.log(loss)

    limits = ([-20, -20, 0], [2, 20, LARGEST_EXPONENT])
    wanted = min(
        least_squares(
            residual, [np.log(floor), 0.1, alpha], bounds=limits, loss="huber", f_scale=DELTA,
            xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=5000,
        ).cost
        for floor in (1.0, 2.0, 2.8)
        for alpha in (0.1, 0.5, 1.5)
    )  # fmt: skip
    best = [np.log(fit.best[2]), np.log(fit.best[0]) - fit.best[1] * np.log(compute).mean(),
            fit.best[1]]  # fmt: skip
    mine = DELTA**2 * float(huber(1.0, residual(np.array(best)) / DELTA).sum())
    assert mine <= wanted * (1 + 1e-6)


FOUR = np.array([1e15, 3e15, 1e16, 3e16])


@pytest.mark.parametrize(
    ("compute", "loss"),
    [
        (FOUR, 2 + 50 / FOUR**0.1 + np.random.default_rng(0).normal(0, 0.05, 4)),
        (FOUR, [4.0, 3.6, 9.0, 3.1]),  # one run went wrong
        (FOUR, [3.0, 3.0, 3.0, 3.0]),
        (FOUR, [3.0, 3.1, 3.2, 3.3]),
        (FOUR, [3.0, 3.3, 3.0, 3.3]),
        ([1e15, 1.0001e15, 1e16, 1.0001e16], [4, 4.01, 3.5, 3.49]),  # two places, not four
        ([1e15, 1.1e15, 1.2e15, 1.3e15], [3.0, 2.98, 2.99, 2.97]),  # too close together
    ],
)
def test_what_the_cells_do_not_determine_is_said_and_no_finding(
    compute: np.ndarray, loss: np.ndarray
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = fit_compute(compute, loss)
    for name in ("alpha", "E"):
        assert any(f"the cells do not determine {name}" in note for note in fit.notes), fit.notes
    assert set(fit.undetermined) == {"A", "alpha", "E"}
    assert fit.parameters["A"] == Interval(None, None, None)  # could be any power of ten
    assert all(np.isfinite(fit.best))
    json.dumps(asdict(fit), allow_nan=False)


def test_an_exponent_of_sizes_alone_is_said_to_be_open() -> None:
    """Of two inputs one may be told and the other not."""
    sizes, tokens = (g.ravel() for g in np.meshgrid(np.logspace(7, 9, 4), np.logspace(9, 11, 4)))
    loss = 1.69 + 406.4 / sizes**0.34 + 1e-9 / tokens  # tokens change nothing
    random = np.random.default_rng(2)
    fit = fit_size_tokens(sizes, tokens, loss * np.exp(0.003 * random.standard_normal(16)))
    assert {"B", "beta"} <= set(fit.undetermined)
    assert fit.parameters["B"].value is None
    assert not {"A", "alpha"} & set(fit.undetermined)


def test_one_spoiled_cell_moves_it_little_and_squares_much() -> None:
    loss = law(COMPUTE)
    loss[7] *= 1.1  # a run that went wrong
    fit = fit_compute(COMPUTE, loss, draws=0)
    assert fit.parameters["alpha"].value == pytest.approx(ALPHA, rel=0.02)
    assert fit.parameters["E"].value == pytest.approx(E, rel=0.02)
    assert fit.rms_log_residual > 0.02


def test_sizes_and_tokens() -> None:
    sizes, tokens = (g.ravel() for g in np.meshgrid(np.logspace(7, 9, 4), np.logspace(9, 11, 4)))
    loss = 1.69 + 406.4 / sizes**0.34 + 410.7 / tokens**0.28  # Hoffmann et al.'s, equation 10
    fit = fit_size_tokens(sizes, tokens, loss, draws=2)
    for name, known in (("E", 1.69), ("A", 406.4), ("B", 410.7), ("alpha", 0.34), ("beta", 0.28)):
        assert fit.parameters[name].value == pytest.approx(known, rel=0.02)
    wanted = 1.69 + 406.4 / 7e10**0.34 + 410.7 / 1.4e12**0.28
    assert predict(fit, 7e10, 1.4e12).value == pytest.approx(wanted, rel=1e-3)


def test_too_few_or_unusable_cells_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^cells: got 3 distinct computes; .* at least 4"):
        fit_compute([1e18, 2e18, 3e18, 3e18], [3, 2.9, 2.8, 2.81])
    with pytest.raises(ConfigError, match=r"^cells: got loss nan; accepted: finite"):
        fit_compute(COMPUTE, [float("nan"), *law(COMPUTE)[1:]])
    with pytest.raises(ConfigError, match=r"^cells: got compute of shape \(2,\)"):
        fit_compute([1e18, 2e18], [3.0])
    grid = np.logspace(7, 9, 8)
    with pytest.raises(ConfigError, match="got one number of tokens for each of 8 sizes"):
        fit_size_tokens(grid, 50 * grid, 2 + grid**-0.1)
    with pytest.raises(ConfigError, match="got 4 distinct sizes and 2 distinct tokens"):
        fit_size_tokens(np.repeat(grid[:4], 2), np.tile([1e9, 2e9], 4), np.full(8, 3.0))
    with pytest.raises(ConfigError, match="got 4 distinct sizes and tokens; accepted: at least 6"):
        fit_size_tokens(grid[:4], grid[:4], np.full(4, 3.0))


def test_a_straight_power_law_says_that_it_has_no_floor() -> None:
    fit = fit_compute(COMPUTE, 900 / COMPUTE**0.15, draws=0)
    assert fit.parameters["alpha"].value == pytest.approx(0.15, rel=1e-3)
    assert any("E is 0" in note for note in fit.notes)


def test_twice_the_efficiency_is_a_factor_of_two_everywhere() -> None:
    arm = fit_compute(COMPUTE, law(COMPUTE, 2.0), draws=8)
    fixed = fit_compute(COMPUTE, law(COMPUTE), draws=8)
    for compute in (3e17, 1e19, 5e19):
        found = efficiency_at_compute(arm, fixed, compute)
        assert found.factor.value == pytest.approx(2, rel=1e-3)
        assert found.compute == compute
        assert not found.extrapolated
    at_loss = efficiency_at_loss(arm, fixed, float(law(np.array(1e19))))
    assert at_loss.factor.value == pytest.approx(2, rel=1e-3)
    assert at_loss.compute == pytest.approx(1e19, rel=1e-3)
    assert efficiency_at_compute(arm, fixed, 1e24).extrapolated
    assert efficiency_at_loss(fixed, arm, 2.9).factor.value == pytest.approx(0.5, rel=1e-3)


def test_an_arm_with_a_higher_floor_has_no_efficiency_below_it() -> None:
    arm = fit_compute(COMPUTE, 0.5 + law(COMPUTE), draws=8)
    fixed = fit_compute(COMPUTE, law(COMPUTE), draws=8)
    below = efficiency_at_loss(arm, fixed, 2.0)
    assert below.factor.value == 0
    assert efficiency_at_loss(fixed, arm, 2.0).factor.value is None  # the reference never has it
    assert efficiency_at_loss(arm, fixed, 1.0).factor.value is None  # neither has
    growing = [efficiency_at_compute(arm, fixed, c).factor.value for c in (1e18, 1e19, 1e20)]
    assert growing == sorted(growing, reverse=True)


def test_laws_that_never_meet_warn_of_nothing() -> None:
    """A law that hardly falls has some loss with 0 FLOPs, another one with infinitely many."""
    fixed = fit_compute(COMPUTE, law(COMPUTE), draws=8)
    rows = [[1.0, 1e-4, 1.0], [1.0, 1e-4, 1.0], [9.0, 1e-4, 1.0], [1.0, 0.0, 1.0], [1.0, 3.0, 9.0]]
    arm = replace(fixed, best=rows[0], draws=rows[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        below = efficiency_at_compute(arm, fixed, 1e18)
        above = efficiency_at_compute(fixed, arm, 1e18)
    # its loss is below that of the other with any FLOPs: as many times fewer as one likes
    assert below.factor.value is None
    assert below.factor.low == 0
    assert above.factor.value == pytest.approx(0, abs=1e-5)


def test_the_interval_of_the_factor_holds_the_known_one_and_is_reproducible() -> None:
    arm = fit_compute(COMPUTE, noisy(1, 0.002), draws=60, seed=3)
    fixed = fit_compute(COMPUTE, noisy(2, 0.002), draws=60, seed=4)
    factor = efficiency_at_compute(arm, fixed, 3e18).factor  # the same law: 1
    assert factor.low is not None
    assert factor.high is not None
    assert factor.low < 1 < factor.high
    again = fit_compute(COMPUTE, noisy(1, 0.002), draws=60, seed=3)
    assert again == arm
    assert json.loads(json.dumps(asdict(arm))) == asdict(arm)


def test_bootstraps_of_one_seed_do_not_cancel() -> None:
    fit = fit_compute(COMPUTE, noisy(1), draws=20)
    factor = efficiency_at_compute(fit, fit, 3e18).factor
    assert factor.low is not None
    assert factor.high is not None
    assert factor.low < 0.99 < 1.01 < factor.high


def test_pareto() -> None:
    compute = [4, 1, 2, 3, 2, 5, 5]
    loss = [2.0, 4.0, 3.0, 3.5, 3.1, 1.9, float("nan")]
    assert pareto(compute, loss) == [1, 2, 0, 5]
    assert pareto([], []) == []
