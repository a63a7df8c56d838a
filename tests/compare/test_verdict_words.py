"""How the verdict is worded."""

from __future__ import annotations

from megatron_progressive.compare.decision import against
from megatron_progressive.compare.verdict_words import (
    report_title,
    sentence,
    short_text,
    study_title,
    tally,
)

BELOW = against("the short control", [(1, -5.0), (2, -5.2), (3, -4.9)])
LEVEL = against("the source", [(1, -0.1), (2, 0.2), (3, -0.2)])
ABOVE = against("the source", [(1, 5.0), (2, 5.2), (3, 4.9)])
NONE = against("the source", [])


def test_the_sentence_names_every_control_that_is_there_and_those_that_lack() -> None:
    assert sentence([BELOW, NONE]).startswith(
        "Whether growing pays at equal FLOPs is open (without the source), against the short "
        "control: below, -5.03 %"
    )
    assert "against the source: not below, +5.03 %" in sentence([BELOW, ABOVE])
    assert sentence([BELOW, BELOW]).startswith("Growing pays at equal FLOPs, against")
    assert short_text([BELOW, NONE]).endswith(
        "5.0 % below the short control: open (3 pairs, without the source)"
    )
    assert "whether it pays is open" in short_text([NONE])
    assert short_text([BELOW, LEVEL]).endswith("the source: open (3 pairs)")


def test_the_sentence_says_what_of_a_control_is_missing() -> None:
    pairs = [(1, -5.0), (2, -5.2), (3, -4.9)]
    one = against("c", pairs, lacking=["seed 1: no never-grown run of 4 layers"])
    assert sentence([one]).endswith("; seed 1: no never-grown run of 4 layers.")


def test_the_sentence_says_that_pairs_without_a_spread_do_not_differ() -> None:
    same = against("c", [(1, -5.0), (2, -5.0), (3, -5.0)])
    assert "do not differ at all" in sentence([same])


def test_titles_have_the_outcome_of_each_recipe() -> None:
    assert report_title(1, [], []) == "1 run, none of them progressive"
    assert report_title(2, ["a: diverged"], [[NONE]]) == "a: diverged"
    assert report_title(9, ["a", "b"], [[BELOW]]).startswith("At equal FLOPs growing ends 5.0 % b")
    assert report_title(9, ["a", "b"], [[BELOW], [ABOVE]]) == (
        "At equal FLOPs growing pays in 1 of 2 comparisons, does not pay in 1"
    )
    fixed = against("fixed-size", [(1, 0.1), (2, 0.2), (3, 0.15)], bound=0.5)
    assert study_title("s", [[BELOW, NONE], [NONE]], [fixed, NONE]) == (
        "s: at equal FLOPs growing pays in 0 of 1 comparison, open in 1, against the short control "
        "(without the source); for fewer FLOPs within 0.5 % of fixed-size in 1 of 1"
    )
    assert study_title("s", [[NONE]], []).endswith("so whether growing pays is open")


def test_the_tally_names_what_there_is() -> None:
    assert tally(["pays", "open", "open"]) == "pays in 1 of 3 comparisons, open in 2"
    assert tally(["does not pay"]) == "pays in 0 of 1 comparison, does not pay in 1"
