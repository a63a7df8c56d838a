"""Laws of a study, what they predict and save, on losses that lie on planted laws."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest

from megatron_progressive.grid.cells import params_of
from megatron_progressive.grid.report import figures as grid_figures
from megatron_progressive.grid.report import report as grid_report
from megatron_progressive.grid.report.judged import GridReport
from megatron_progressive.grid.report.law_words import between_text, interval_factor
from megatron_progressive.grid.report.laws import Law, Saving
from megatron_progressive.grid.report.report import make_grid_report
from megatron_progressive.grid.state import Study
from megatron_progressive.laws import fits
from megatron_progressive.laws.efficiency import Efficiency, Multiplier
from megatron_progressive.laws.fits import Interval
from tests.grid.report.planted import SIZES, set_loss, study_of
from tests.runs.synthetic import PLANTED, planted_loss, write_study


def test_laws_are_those_that_were_planted(planted: tuple[Study, GridReport]) -> None:
    _, report = planted
    assert report.complete
    laws = {law.family: law.fit for law in report.laws}
    assert set(laws) == {"fixed-size", "zero-layer", "one-layer", "short control of zero-layer",
                         "short control of one-layer"}  # fmt: skip
    for family, fit in laws.items():
        assert fit is not None
        floor, alpha = PLANTED[family.replace("-", "_").split(" of ")[0].replace("short control",
                               "short_control").replace("fixed_size", "fixed")]  # fmt: skip
        assert fit.parameters["E"].value == pytest.approx(floor, rel=0.02)
        assert fit.parameters["alpha"].value == pytest.approx(alpha, rel=0.02)
        assert fit.cells == 4


def test_savings_are_the_quotient_of_the_laws(planted: tuple[Study, GridReport]) -> None:
    study, report = planted
    assert len(report.savings) == 2 * 2 * 4  # arms that grow, references, sizes
    flops = {cell.name: cell.flops for cell in study.grid.cells}
    for saving in report.savings:
        if saving.family != "zero-layer" or saving.reference != "fixed-size":
            continue
        compute = flops[f"{saving.size}-fixed-s1"]
        loss = planted_loss("fixed", compute)
        low, high = 1e6, 1e16  # FLOPs with which the planted law has that loss, by bisection
        for _ in range(100):
            middle = (low * high) ** 0.5
            low, high = (
                (middle, high) if planted_loss("zero_layer", middle) > loss else (low, middle)
            )
        assert saving.efficiency.factor.value == pytest.approx(compute / low, rel=0.01)


def test_sources_never_grown_have_laws_and_are_measured_against(tmp_path: Path) -> None:
    """Over sizes of the full depth; alone, where parameters are counted."""
    arms = ["fixed", "gradual_stack", "short_control", "never_grown"]
    sizes = [{**size, "to_layers": 8} for size in SIZES]
    study = study_of(tmp_path, arms=arms, sizes=sizes)
    write_study(study.grid)
    report = make_grid_report(study)
    full = {c.size: params_of(c) for c in study.grid.cells if c.arm == "fixed"}
    families = [f"never-grown of gradual stacking, stage {stage}" for stage in (1, 2)]
    laws = {law.family: law.fit for law in report.laws}
    for family in families:
        fit = laws[family]
        assert fit is not None
        assert fit.parameters["alpha"].value == pytest.approx(PLANTED["never_grown"][1], rel=0.02)
        mine = [saving for saving in report.savings if saving.reference == family]
        assert {saving.size: saving.params for saving in mine} == full
    assert {one.size: one.params for one in report.findings} == full
    scratch, *others = report.size_token_laws
    assert not any("never_grown" in name for name in scratch.cells)
    assert [law.family for law in others if "never" in law.family] == families
    values = json.loads((study.folder / "report.json").read_text())
    params = {c["cell"]: c["params"] for c in values["cells"]}
    assert params["w16-never_grown_of_gradual_stack_2-s1"] < full["w16"] / 2
    page = (study.folder / "report.html").read_text()
    assert f"<td>{families[0]}</td>" in page
    assert "<li>never-grown: " in page


def test_a_law_that_stays_above_and_runs_too_short_to_mix(tmp_path: Path) -> None:
    study = study_of(tmp_path, tau=[0.9], arms=["fixed", "zero_layer"])
    write_study(study.grid)
    for number, size in enumerate(SIZES):
        set_loss(study, f"{size['name']}-zero_layer-tau0.9-random-s1", 5.0 + 0.1 / 4**number)
    report = make_grid_report(study)
    assert {saving.efficiency.factor.value for saving in report.savings} == {0.0}
    assert "no law of a run that grows comes down" in grid_report._savings_title(report.savings)
    assert [one.mixed for one in report.findings] == [[]] * 4
    assert "too few validations" in grid_report._mixing_title(report.findings)
    page = (study.folder / "report.html").read_text()
    assert "A factor of 0: its law" in page
    assert "0 of 0" not in page


def test_headlines_of_laws_claim_no_more_than_their_intervals() -> None:
    compute = np.logspace(15, 18, 8)
    random = np.random.default_rng(0)

    def law(family: str, alpha: float, noise: float) -> Law:
        loss = (2 + 3 * (1e15 / compute) ** alpha) * np.exp(noise * random.standard_normal(8))
        return Law(family, [], fits.fit_compute(compute, loss))

    flat, steep, open_ = law("flat", 0.1, 1e-4), law("steep", 0.2, 1e-4), law("open", 0.1, 0.2)
    assert open_.fit is not None
    assert "alpha" in open_.fit.undetermined
    refused = Law("few", [], None, "too few")
    title = grid_report._laws_title
    assert title([refused]).endswith("too few cells for a law")
    assert title([open_, refused]).endswith("do not determine the exponents α of the laws")
    assert title([open_, flat]).endswith("determine the exponent α of flat only")
    assert title([steep, flat]).endswith("the law of steep falls more steeply than that of flat")
    assert title([flat, law("twin", 0.1, 1e-4)]).endswith("cannot be told apart")
    assert "α of flat from 0.0" in title([flat]) or "α of flat from 0.1" in title([flat])

    def saving(factor: Interval) -> Saving:
        found = Efficiency(2.5, 1e13, factor, extrapolated=False)
        return Saving("zero-layer", "fixed-size", "w1", 1, found, Multiplier(None))

    title_of = grid_report._savings_title
    assert "fixed-size needs 1.30x the FLOPs" in title_of([saving(Interval(1.3, 1.1, 1.5))])
    for interval in (Interval(1.3, 0.9, 1.5), Interval(0.8, 0.1, None), Interval(9.0, None, None)):
        assert "what fixed-size needs is open" in title_of([saving(interval)])
    page = interval_factor(Interval(1e44, 0.0, None))
    assert page == ">50x (0 to open)"


def test_a_law_that_hardly_comes_down_to_a_loss_leaves_the_picture_whole(tmp_path: Path) -> None:
    """Its factor can be any power of ten."""
    family = "zero-layer τ=0.5"
    savings = [
        Saving(family, "fixed-size", f"w{size}", size,
               Efficiency(2.5, 1e13, Interval(factor, 0.0, None), extrapolated=True),
               Multiplier(None))
        for size, factor in ((10_000, 0.8), (20_000, 1e30), (40_000, 1e-30))
    ]  # fmt: skip
    control = [replace(s, reference=f"short control of {family}",
                       efficiency=replace(s.efficiency, factor=Interval(0.9, 0.5, 1.5)))
               for s in savings]  # fmt: skip
    styles = {family: grid_figures.Look("#0072b2", "o", family)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that leaves the axes no room
        assert grid_figures.efficiency(
            savings + control, styles, "title", tmp_path / "efficiency.png"
        )
    assert [grid_figures.factor_text(s.efficiency.factor.value or 0) for s in savings] == [
        "0.80x", ">50x", "<0.1x",
    ]  # fmt: skip


MORE = [*SIZES, {"name": "w128", "to_layers": 4, "model.hidden_size": 128}]


def test_the_largest_size_is_predicted_from_the_smaller_ones(tmp_path: Path) -> None:
    study = study_of(tmp_path, sizes=MORE, arms=["fixed"])
    write_study(study.grid, noise=1e-4)
    flops = next(cell.flops for cell in study.grid.cells if cell.name == "w128-fixed-s1")
    law = planted_loss("fixed", flops)
    for break_, inside in ((1.0, True), (1.05, False)):
        set_loss(study, "w128-fixed-s1", break_ * law)
        report = make_grid_report(study)
        (mine,) = (one for one in report.predictions if one.family == "fixed-size")
        assert mine.rollout is not None
        assert (mine.size, mine.rollout.cells) == ("w128", 4)
        assert mine.rollout.measured == pytest.approx(break_ * law)
        assert mine.rollout.predicted.value == pytest.approx(law, rel=0.003)
        assert mine.rollout.inside is inside
        error = 100 * (mine.rollout.predicted.value / (break_ * law) - 1)
        said = f"measured is {break_ * law:.4f} (error {error:+.2f} %, "
        said += "inside" if inside else "outside"
        assert f"predicts {mine.rollout.predicted.value:.4f} at w128, {said}" in report.text
        page = (study.folder / "report.html").read_text()
        row = f"<td>{error:+.2f} %</td><td>{'inside' if inside else 'outside'}</td>"
        assert row in page
        values = json.loads((study.folder / "report.json").read_text())["predictions"]
        (told,) = (one for one in values if one["family"] == "fixed-size")
        assert (told["error_percent"], told["inside"]) == (pytest.approx(error), inside)


def test_why_the_largest_size_is_not_predicted_is_said(
    planted: tuple[Study, GridReport], tmp_path: Path
) -> None:
    study, report = planted  # four sizes: a law, but none without the largest
    why = "got 3 distinct computes; accepted: at least 4 for E + A / C^alpha"
    said = f"not predicted from the smaller ones for any of the 5 kinds of run: cells: {why}."
    assert said in report.text
    assert said in (study.folder / "report.html").read_text()
    values = json.loads((study.folder / "report.json").read_text())["predictions"]
    assert [one["rollout"] for one in values] == [None] * 5
    one = study_of(tmp_path, sizes=SIZES[:1])
    write_study(one.grid)
    report = make_grid_report(one)
    assert "not predicted" not in report.text  # the laws are refused already
    assert "got 1 size; accepted: at least 2" in (one.folder / "report.html").read_text()


def test_the_multiplier_without_a_law_stands_beside_the_laws(
    planted: tuple[Study, GridReport],
) -> None:
    """On laws that hold both say the same; where the cells do not reach, a bound and its reason."""
    study, report = planted
    inner = 0
    for one in report.savings:
        assert one.efficiency is not None
        factor = one.efficiency.factor.value
        assert factor is not None
        low, high = one.between.at_least or 0.0, one.between.at_most or np.inf
        if one.between.value is None:
            assert low <= factor <= high
            assert one.between.why
        else:
            inner += 1
            assert one.between.value == pytest.approx(factor, rel=0.05)
    assert inner >= 8
    page = (study.folder / "report.html").read_text()
    values = json.loads((study.folder / "report.json").read_text())["savings"]
    for one, told in zip(report.savings, values, strict=True):
        assert f"<td>{escape(between_text(one.between))}</td>" in page
        assert told["between"]["value"] == one.between.value
        line = f"{one.family} at {one.size}, FLOPs of {one.reference} over its own at equal loss: "
        assert (line in report.text) is (one.size == "w96")
    assert "between cells without a law" in report.text


def test_without_laws_cells_still_give_a_multiplier(tmp_path: Path) -> None:
    study = study_of(tmp_path, sizes=SIZES[:2], arms=["fixed", "zero_layer", "short_control"])
    write_study(study.grid)
    report = make_grid_report(study)
    assert report.savings
    assert all(one.efficiency is None for one in report.savings)
    assert "by the laws no law, between cells without a law" in report.text
    assert "efficiency" not in report.pictures
    page = (study.folder / "report.html").read_text()
    assert "<td>no law</td>" in page
    alone = study_of(tmp_path, sizes=SIZES[:1], study={"name": "one", "dir": str(tmp_path)})
    write_study(alone.grid)
    assert make_grid_report(alone).savings == []
    assert "cells of it at two numbers of FLOPs" in (alone.folder / "report.html").read_text()
