"""Whether growing pays: what pairs decide, and how many a difference needs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from megatron_progressive.compare.decision import (
    against,
    overall,
    pairs_needed,
)


# Cohen 1988, table 2.4.1 and G*Power 3.1 (t test of matched pairs, two-sided, 5 %, power 80 %)
@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_pairs_needed_are_the_tables(effect: float, pairs: int) -> None:
    assert pairs_needed(effect, 1.0) == pairs
    assert pairs_needed(-3 * effect, 3.0) == pairs


def test_so_many_pairs_find_it_four_times_in_five() -> None:
    random, effect = np.random.default_rng(0), 0.9
    pairs = pairs_needed(effect, 1.0)
    assert pairs is not None
    for count, least, most in ((pairs, 0.79, 0.87), (pairs - 1, 0.7, 0.8)):
        drawn = random.normal(effect, 1.0, (20_000, count))
        found = float((ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean())
        assert least < found < most


def test_pairs_needed_have_ends() -> None:
    assert pairs_needed(1e6, 1.0) == 2
    assert pairs_needed(1e-6, 1.0) is None  # more than 10,000
    assert pairs_needed(0.0, 1.0) is None
    assert pairs_needed(1.0, 0.0) is None


def test_one_seed_under_several_names_is_one_pair() -> None:
    one = against("c", [(1, -5.0), (1, -5.1), (1, -4.9), (1, -5.0)])
    assert (one.values, one.outcome) == ([pytest.approx(-5.0)], "open")
    same = against("c", [(1, -5.0), (2, -5.0), (3, -5.0)])  # no spread, so no t
    assert same.outcome == "open"


def test_every_control_has_to_be_undercut() -> None:
    below = against("the short control", [(1, -5.0), (2, -5.2), (3, -4.9)])
    level = against("the source", [(1, -0.1), (2, 0.2), (3, -0.2)])
    above = against("the source", [(1, 5.0), (2, 5.2), (3, 4.9)])
    none = against("the source", [])
    assert [one.outcome for one in (below, level, above, none)] == [
        "below", "open", "not below", "open",
    ]  # fmt: skip
    assert overall([below, below]) == "pays"
    assert overall([below, level]) == "open"
    assert overall([below, above]) == overall([level, above]) == "does not pay"
    # without one of them nothing pays; that it does not needs no other
    assert overall([below, none]) == overall([none]) == overall([]) == "open"
    assert overall([none, above]) == "does not pay"


def test_a_run_that_diverged_keeps_the_others_from_paying() -> None:
    pairs = [(1, -5.0), (2, -5.2), (3, -4.9)]
    assert against("c", pairs, left_out=["seed 4: it diverged"], diverged=True).outcome == "open"
    lost = [(seed, -gap) for seed, gap in pairs]
    assert against("c", lost, diverged=True).outcome == "not below"


def test_a_control_of_which_a_part_is_missing_shows_only_what_is_lost_to_it() -> None:
    pairs = [(1, -5.0), (2, -5.2), (3, -4.9)]
    one = against("c", pairs, lacking=["seed 1: no never-grown run of 4 layers"])
    assert one.outcome == "open"
    lost = [(seed, -gap) for seed, gap in pairs]
    assert against("c", lost, lacking=["seed 1: no run"]).outcome == "not below"


def test_a_bound_other_than_zero_is_what_the_difference_is_taken_from() -> None:
    gaps = [(1, 0.1), (2, 0.2), (3, 0.15)]
    one = against("fixed-size", gaps, bound=0.5)
    assert one.outcome == "below"  # above it, and within what is allowed
    assert one.pairs_needed == pairs_needed(0.15 - 0.5, 0.05)
    assert against("fixed-size", gaps).outcome == "not below"
