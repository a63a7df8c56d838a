"""The report of a study, on run folders whose losses lie on planted laws (``synthetic``)."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_1samp

from megatron_progressive import cli
from megatron_progressive.grid.grid import load_grid
from megatron_progressive.grid.report.judged import GridReport
from megatron_progressive.grid.report.report import make_grid_report
from megatron_progressive.grid.state import Study
from tests.grid.report.planted import SIZES, set_loss, study_of
from tests.runs.synthetic import planted_loss, write_study


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
    assert "<td>no law</td>" in text
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
              and r[7] == "cosine")  # fmt: skip
    assert row[-1] == "3.0300 (+1.00 %)"  # against the fixed-size run of its own schedule
    (one,) = (o for o in report.findings if o.family == "one-layer τ=0.3 copying cosine")
    assert one.to_fixed.mean == pytest.approx(1.0)
    assert "Variants of the expansion" in (study.folder / "report.html").read_text()


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
