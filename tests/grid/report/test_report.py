"""The report of a study, on run folders whose losses lie on planted laws (``synthetic``)."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import warnings
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_1samp

from megatron_progressive import cli
from megatron_progressive.compare import mixing
from megatron_progressive.grid.cells import params_of
from megatron_progressive.grid.grid import load_grid
from megatron_progressive.grid.report import figures as grid_figures
from megatron_progressive.grid.report import page as grid_page
from megatron_progressive.grid.report import report as grid_report
from megatron_progressive.grid.report.judged import GridReport
from megatron_progressive.grid.report.laws import Law, Saving
from megatron_progressive.grid.report.report import make_grid_report
from megatron_progressive.grid.state import Study
from megatron_progressive.laws import fits
from megatron_progressive.laws.efficiency import Efficiency
from megatron_progressive.laws.fits import Interval
from tests.runs.synthetic import PLANTED, planted_loss, write_study

SIZES = [
    {"name": f"w{width}", "to_layers": 4, "model.hidden_size": width} for width in (16, 32, 64, 96)
]
GROWN = ["zero_layer", "one_layer"]


@pytest.fixture(autouse=True, scope="module")
def _few_draws() -> Any:
    """Bootstraps of 60 samples: their width is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        for function in (fits.fit_compute, fits.fit_size_tokens, mixing.mixing_time):
            patch.setitem(function.__kwdefaults__, "draws", 60)
        yield


def study_of(folder: Path, **changes: Any) -> Study:
    values: dict[str, Any] = {
        "study": {"name": "study", "dir": str(folder), "retries": 0},
        "run": {
            "model": {"family": "llama3"},
            "data": {"vocab_size": 512, "sequence_length": 32},
            "train": {"steps": 100, "global_batch": 4, "micro_batch": 4, "eval_every": 5},
        },
        "sizes": SIZES,
        "arms": ["fixed", *GROWN, "short_control"],
        "tau": [0.5],
        **changes,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(values))
    return Study(load_grid(path))


def set_loss(study: Study, name: str, loss: float) -> None:
    """Another final loss of a finished cell."""
    (cell,) = (cell for cell in study.grid.cells if cell.name == name)
    summary = json.loads((cell.folder / "summary.json").read_text())
    (cell.folder / "summary.json").write_text(json.dumps({**summary, "final_eval_loss": loss}))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, GridReport]:
    study = study_of(tmp_path_factory.mktemp("planted"))
    write_study(study.grid)
    return study, make_grid_report(study)


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


def test_verdict_of_each_size_is_the_arithmetic_of_its_cells(
    planted: tuple[Study, GridReport],
) -> None:
    study, report = planted
    by_name = {cell.name: cell for cell in study.grid.cells}
    assert [(one.size, one.family) for one in report.findings] == [
        (f"w{width}", family)
        for width in (16, 32, 64, 96)
        for family in ("zero-layer", "one-layer")
    ]
    for one in report.findings:
        arm = one.family.replace("-", "_")
        init = "random" if arm == "zero_layer" else "copying"
        grown = by_name[f"{one.size}-{arm}-tau0.5-{init}-s1"]
        short = by_name[f"{one.size}-short_control_of_{arm}-tau0.5-{init}-s1"]
        fixed = by_name[f"{one.size}-fixed-s1"]
        ours = planted_loss(arm, grown.flops)
        to_short, to_never = one.controls
        assert to_never.mean is None  # the grid has none
        assert to_short.mean == pytest.approx(
            100 * (ours / planted_loss("short_control", short.flops) - 1)
        )
        assert one.to_fixed.mean == pytest.approx(
            100 * (ours / planted_loss("fixed", fixed.flops) - 1)
        )
        assert one.flops_share == pytest.approx(grown.flops / fixed.flops)
        assert one.outcome == to_short.outcome == one.to_fixed.outcome == "open"
        assert "one seed decides nothing" in one.sentence
        assert "is open (without the source never grown)" in one.sentence
        assert f"against the short control: {to_short.mean:+.2f} %" in one.sentence
    lower = sum(one.controls[0].mean < 0 for one in report.findings)
    words = "open in 8, against the short control (without the source never grown)"
    assert f"pays in 0 of 8 comparisons, {words}" in report.title
    assert f"(one seed each; {lower} end below)" in report.title
    page = (study.folder / "report.html").read_text()
    assert not re.search(r"\b(wins|loses|LOSES|beats)\b|Growing (pays|does not)", page)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.depth: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        if tag not in ("meta", "img", "br"):
            self.depth.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "data", "srcset"):
                assert (value or "").startswith("data:image/png;base64,")
            if key == "alt":
                self.images.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag


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


def test_the_page_is_whole_and_needs_nothing(planted: tuple[Study, GridReport]) -> None:
    study, _ = planted
    text = (study.folder / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert not page.depth
    assert page.images == ["laws", "frontier", "efficiency", "mixing"]
    assert not re.search(r"url\(|@import|https?://", text)
    for cell in study.grid.cells:
        assert f"<td>{cell.name}</td><td>finished</td><td>{cell.fingerprint}</td>" in text
    for words in ("stdlib", "muon_nsgd", "0.1.0 (abc1234): 20 cells", "to_layers: 4",
                  "for as many steps as give it the total FLOPs"):  # fmt: skip
        assert words in text
    assert "Partial" not in text
    assert "failures" not in text


def test_json_says_the_same_without_nan(planted: tuple[Study, GridReport]) -> None:
    study, report = planted

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    values = json.loads((study.folder / "report.json").read_text(), parse_constant=refuse)
    assert values["title"] == report.title
    assert values["complete"] is True
    assert len(values["cells"]) == 20
    assert {law["family"]: law["fit"]["cells"] for law in values["laws"]} == {
        law.family: 4 for law in report.laws
    }
    assert "draws" not in json.dumps(values["laws"])
    results = json.loads((study.folder / "results.json").read_text())["cells"]
    assert [row["final_eval_loss"] for row in results] == [
        cell["final_eval_loss"] for cell in values["cells"]
    ]
    # the frontier, by definition: whatever is not on it is beaten by some cell
    points = {c["cell"]: (c["total_flops"], c["final_eval_loss"]) for c in values["cells"]}
    for name, (flops, loss) in points.items():
        beaten = any(f <= flops and x <= loss and n != name for n, (f, x) in points.items())
        assert beaten is (name not in values["frontier"])


def test_a_partial_grid_gives_a_partial_report(tmp_path: Path, capsys: Any) -> None:
    study = study_of(tmp_path)
    write_study(study.grid, skip=["w96", "w64-short_control_of_zero", "w32-fixed"])
    failed = next(cell for cell in study.grid.cells if cell.name == "w96-fixed-s1")
    attempt = {"failures": 1, "error": "rank 0: RuntimeError: <no> memory", "version": "0.1.0"}
    study.file("attempts", failed, ".json").write_text(json.dumps(attempt))
    other = next(cell for cell in study.grid.cells if cell.name == "w16-fixed-s1")
    attempt = {"failures": 0, "error": "", "version": "0.1.0 (fedcba9-dirty)"}
    study.file("attempts", other, ".json").write_text(json.dumps(attempt))
    assert cli.main(["grid", "report", str(study.grid.file)]) == 0
    said = capsys.readouterr().out
    text = (study.folder / "report.html").read_text()
    top = text[: text.index("<h2>")]
    assert "<strong>Partial.</strong> 13 of 20 cells are finished (6 waiting, 1 failed)" in top
    assert "13 of 20 cells are finished" in said
    assert "w96-fixed-s1 (failures: 1): rank 0: RuntimeError: &lt;no&gt; memory" in text
    assert "0.1.0 (abc1234): 12 cells" in text
    assert "0.1.0 (fedcba9-dirty): 1 cells" in text
    assert "Cells of several versions are compared here" in text
    # too few cells: the number that a law needs
    refusal = "got 3 distinct computes; accepted: at least 4 for E + A / C^alpha"
    for where in (text, said):
        few = "zero-layer, one-layer, short control of one-layer"
        assert f"No law of {few}: cells: {refusal}." in where
        # without the w64 short control and the w32 fixed-size run
        assert "No law of fixed-size, short control of zero-layer: cells: got 2 dist" in where
    assert not (study.folder / "efficiency.png").exists()
    assert "A factor at equal loss needs the laws" in text
    values = json.loads((study.folder / "report.json").read_text())
    found = {(one["size"], one["family"]): one for one in values["findings"]}
    assert ("w96", "zero-layer") not in found
    assert found["w64", "zero-layer"]["controls"][0]["mean"] is None
    assert found["w32", "zero-layer"]["to_fixed"]["mean"] is None
    assert "(no the short control" not in json.dumps(values)
    without = "is open (without the short control and the source never grown)"
    assert without in found["w64", "zero-layer"]["sentence"]
    # what makes them: the cell of its own, or the grid with the arm that it lacks
    commands = {(one["run"], one["arm"]): one["command"] for one in values["missing"]}
    cell = "w64-short_control_of_zero_layer-tau0.5-random-s1"
    program = f"mprog grid run {study.grid.file}"
    assert (
        commands["w64-zero_layer-tau0.5-random-s1", "short control"] == f"{program} --cell {cell}"
    )
    *_, word = shlex.split(commands["w16-one_layer-tau0.5-copying-s1", "never-grown"])
    more = load_grid(study.grid.file, [word])
    assert {c.arm for c in more.cells} == {*study.grid.arms, "never_grown"}
    assert {c.run_name for c in more.cells} > {c.run_name for c in study.grid.cells}
    line = commands["w16-one_layer-tau0.5-copying-s1", "never-grown"]
    assert f"the grid has no never-grown run, without which nothing pays: {line}" in said
    assert escape(line) in text


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    report = make_grid_report(study)
    assert "whether growing pays is open" in report.title
    assert report.pictures == {}
    assert "0 of 20 cells are finished (20 waiting)" in (study.folder / "report.html").read_text()
    json.loads((study.folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("grown", "never", "decided"),
    [
        ([2.9, 2.92, 2.88], 1.01, "pays"),  # below both
        ([2.9, 2.92, 2.88], 0.9, "does not pay"),  # below the short control alone
        ([3.1, 3.12, 3.08], 1.1, "does not pay"),  # below the source alone
        ([2.99, 2.98, 3.05], 1.1, "open"),
        ([2.9, 2.92, 2.88], None, "open"),  # the source is not trained
    ],
)
def test_seeds_give_an_interval_and_leave_open_what_it_does_not_decide(
    tmp_path: Path, grown: list[float], never: float | None, decided: str
) -> None:
    arms = ["fixed", "zero_layer", "short_control", "never_grown"]
    study = study_of(tmp_path, sizes=SIZES[1:2], seeds=[1, 2, 3], arms=arms)
    write_study(study.grid, skip=["never"] if never is None else [])
    controls = [3.0, 3.01, 2.99]
    for seed, (loss, short) in enumerate(zip(grown, controls, strict=True), 1):
        what = f"zero_layer-tau0.5-random{{}}-s{seed}"
        set_loss(study, f"w32-{what.format('')}", loss)
        set_loss(study, f"w32-short_control_of_{what.format('')}", short)
        if never is not None:
            set_loss(study, f"w32-never_grown_of_{what.format('_0')}", never * short)
    report = make_grid_report(study)
    (one,) = report.findings
    gaps = [100 * (loss / short - 1) for loss, short in zip(grown, controls, strict=True)]
    to_short, to_never = one.controls
    assert to_short.values == pytest.approx(gaps)
    expected = ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert (to_short.low, to_short.high) == pytest.approx(tuple(expected))
    if never is not None:
        gaps = [100 * (a / (never * b) - 1) for a, b in zip(grown, controls, strict=True)]
        assert to_never.values == pytest.approx(gaps)
    assert one.outcome == decided
    page = (study.folder / "report.html").read_text()
    for control in one.controls:
        if control.mean is not None:
            assert f"over 3 pairs; {control.pairs_needed} needed for 80 % power" in one.sentence
            assert f"<td>{control.pairs_needed}</td>" in page
    words = f"Growing {decided} at equal FLOPs, against" if decided != "open" else "is open"
    assert words in one.sentence
    assert f"growing {'pays in 1' if decided == 'pays' else 'pays in 0'} of 1 comp" in report.title
    assert "w32-zero_layer-tau0.5-random-s1" in page
    if never is None:
        assert "Controls are missing" in page
        assert "Growing pays at equal" not in page


def test_sweeps_of_tau_init_and_schedule(tmp_path: Path) -> None:
    sweep: dict[str, Any] = {"sizes": SIZES[:1], "tau": [0.3, 0.6], "init": ["copying", "random"]}
    plain = {cell.config.run.name for cell in study_of(tmp_path, **sweep).grid.cells}
    study = study_of(tmp_path, **sweep, schedule=["wsd", "cosine"])
    names = [cell.name for cell in study.grid.cells]
    assert len(set(names)) == len(names) == 2 * (1 + 2 * 6)
    # the schedule that is configured anyway leaves names and fingerprints as they were
    assert plain == {c.config.run.name for c in study.grid.cells if "cosine" not in c.name}
    write_study(study.grid)
    set_loss(study, "w16-one_layer-tau0.3-copying-cosine-s1", 3.03)
    set_loss(study, "w16-fixed-cosine-s1", 3.0)
    set_loss(study, "w16-fixed-s1", 2.9)
    report = make_grid_report(study)
    assert set(report.pictures) >= {"tau", "mixing", "laws", "frontier"}
    families = {result.family for result in report.results}
    assert "one-layer τ=0.3 copying cosine" in families
    assert "short control of zero-layer τ=0.6 wsd" in families
    assert report.ablation is not None
    head, rows = report.ablation
    assert head[-1] == "w16"
    # zero-layer: 2 schedules at 2 τ; one-layer: 2 inits of each as well
    assert len(rows) == 2 * 2 + 2 * 2 * 2
    (row,) = (r for r in rows if r[0] == "one-layer" and r[1:3] == ["0.3", "copying"]
              and r[6] == "cosine")  # fmt: skip
    assert row[-1] == "3.0300 (+1.00 %)"  # against the fixed-size run of its own schedule
    (one,) = (o for o in report.findings if o.family == "one-layer τ=0.3 copying cosine")
    assert one.to_fixed.mean == pytest.approx(1.0)
    assert "Variants of the expansion" in (study.folder / "report.html").read_text()


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
        return Saving("zero-layer", "fixed-size", "w1", 1, found)

    title_of = grid_report._savings_title
    assert "fixed-size needs 1.30x the FLOPs" in title_of([saving(Interval(1.3, 1.1, 1.5))])
    for interval in (Interval(1.3, 0.9, 1.5), Interval(0.8, 0.1, None), Interval(9.0, None, None)):
        assert "what fixed-size needs is open" in title_of([saving(interval)])
    page = grid_page._factor(Interval(1e44, 0.0, None))
    assert page == ">50x (0 to open)"


def test_an_unreadable_run_is_named_and_does_not_stop_the_report(tmp_path: Path) -> None:
    study = study_of(tmp_path, sizes=SIZES[:1])
    write_study(study.grid)
    broken = next(cell for cell in study.grid.cells if cell.arm == "one_layer")
    (broken.folder / "config.yaml").write_text("run: {name: x}\n")
    shutil.rmtree(study.grid.cells[0].folder)
    report = make_grid_report(study)
    text = (study.folder / "report.html").read_text()
    assert f"{broken.name} (failures: 0): RUN: " in text
    assert [one.family for one in report.findings] == ["zero-layer"]


def test_a_law_that_hardly_comes_down_to_a_loss_leaves_the_picture_whole(tmp_path: Path) -> None:
    """Its factor can be any power of ten."""
    family = "zero-layer τ=0.5"
    savings = [
        Saving(family, "fixed-size", f"w{size}", size,
               Efficiency(2.5, 1e13, Interval(factor, 0.0, None), extrapolated=True))
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
