"""What the report of a crossing study says and draws, on made-up runs that cross where planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_progressive.compare import drawing
from megatron_progressive.grid.cells import ALONE, SCRATCH
from megatron_progressive.grid.grid import Grid, load_grid
from megatron_progressive.grid.report import crossing_figure
from megatron_progressive.grid.report.judged import GridReport
from megatron_progressive.grid.report.report import make_grid_report
from megatron_progressive.grid.state import Study
from tests.grid.test_crossing import PLANTED, crossing_file
from tests.runs.synthetic import alone_loss, write_run

SEEDS = [1, 2]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The pictures of crossings, as they are drawn."""
    found: list[Figure] = []

    def keep(figure: Figure, path: Path) -> None:
        found.append(figure)
        drawing.save(figure, path)

    monkeypatch.setattr(drawing, "DPI", 30)
    monkeypatch.setattr(crossing_figure, "save", keep)
    return found


def write(grid: Grid, noise: float = 0.002) -> None:
    """Runs of every cell that is known and has none. What grows ends 1 % below its short control,
    which is the deep depth of its FLOPs."""
    random = np.random.default_rng(1)
    for cell in grid.cells:
        if cell.unknown or cell.folder.exists():
            continue
        shallow = cell.config.model.num_layers == 2 and not cell.config.expansion
        deep = alone_loss(cell, 0, PLANTED)
        loss = alone_loss(cell, 4, PLANTED) if shallow else deep
        loss *= 0.99 if cell.arm not in SCRATCH else 1.0
        write_run(cell.config, loss + noise * random.standard_normal())


def reported(path: Path) -> GridReport:
    return make_grid_report(Study(load_grid(path)))


def lines_at(figure: Figure) -> list[list[float]]:
    """Of each panel, where its vertical lines are."""
    return [
        [line.get_xdata()[0] for line in axes.lines
         if len(set(line.get_xdata())) == 1 < len(line.get_xdata())
         and list(line.get_ydata()) == [0, 1]]
        for axes in figure.axes
    ]  # fmt: skip


def test_the_planted_crossing_is_found_drawn_and_grown_around(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    path = crossing_file(tmp_path, seeds=SEEDS)
    write(load_grid(path))
    write(load_grid(path))
    report = reported(path)
    (study,) = report.crossings
    assert study.crossing is not None
    at = study.crossing.compute.value
    assert at == pytest.approx(PLANTED, rel=0.15)
    assert (study.crossing.compute.low or 0) < PLANTED < (study.crossing.compute.high or 1e99)
    assert len(study.pairs) == 4 * len(SEEDS)
    assert {pair.seed for pair in study.pairs} == {*SEEDS}
    # pairs are of one seed and budget
    losses = {
        (r.cell.seed, r.cell.axes["budget"], r.cell.axes["depth"]): r.loss
        for r in report.results
        if r.cell.arm == ALONE
    }
    for pair in study.pairs:
        assert pair.shallow == losses[pair.seed, pair.budget, "2"]
        assert pair.deep == losses[pair.seed, pair.budget, "4"]
    assert [one.factor for one in study.around] == ["0.5", "1"]
    for one in study.around:
        assert one.line == "2-layer"
        assert one.flops == pytest.approx(float(one.factor) * (at or 0), rel=0.05)
        assert len(one.losses) == len(SEEDS)
        assert one.controls[0].mean == pytest.approx(-1, abs=0.7)  # steps are coarse
    assert study.title.startswith(f"a: 2 and 4 layers cross at {at:.2e} FLOPs (95 %: ")
    assert f"With fewer than {at:.2e} FLOPs 2 layers from scratch end lower" in study.sentences[0]
    assert study.growth[1].startswith("At the crossing (")
    assert study.growth[0].startswith("At 0.5 times the crossing (")
    (figure,) = drawn
    assert lines_at(figure) == [[at], [at]]
    points = [p for line in figure.axes[0].lines if line.get_marker() in "^s" for p in
              zip(line.get_xdata(), line.get_ydata(), strict=True)]  # fmt: skip
    wanted = [(p.flops, loss) for p in study.pairs for loss in (p.shallow, p.deep)]
    assert sorted(points) == sorted(wanted)
    grown = [(x, y) for line in figure.axes[1].lines if line.get_marker() == "o"
             for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]  # fmt: skip
    assert grown == [(one.flops, one.controls[0].mean) for one in study.around]
    page = (report.grid.folder / "report.html").read_text()
    assert "<h2>Where the depths cross</h2>" in page
    assert study.title in report.text
    values = json.loads((report.grid.folder / "report.json").read_text())
    (saved,) = values["crossings"]
    assert saved["crossing"]["compute"]["value"] == at
    assert len(saved["pairs"]) == 8
    assert "crossing.png" in values["pictures"]
    # the shallow depth is no size of its own
    assert len({r.size_params for r in report.results}) == 1
    assert {r.size_params for r in report.results} == {max(r.params for r in report.results)}
    assert values["missing"] == []  # a crossing study has no fixed-size run to miss
    assert not any("fixed-size" in one["sentence"] for one in values["findings"])


def test_variants_around_the_crossing_are_no_seeds(tmp_path: Path, drawn: list[Figure]) -> None:
    path = crossing_file(tmp_path, seeds=SEEDS, init=["copying", "random"])
    write(load_grid(path))
    write(load_grid(path))
    report = reported(path)
    assert len(report.findings) == 4
    assert all(one.seeds == SEEDS for one in report.findings)
    assert report.ablation is not None
    assert [row[0] for row in report.ablation[1]] == ["2-layer at 0.5x"] * 2 + ["2-layer at 1x"] * 2


def test_before_the_crossing_is_known(tmp_path: Path, drawn: list[Figure]) -> None:
    path = crossing_file(tmp_path)
    grid = load_grid(path)
    report = reported(path)
    assert not drawn
    assert report.crossings[0].title == "a: 0 of 8 cells of depths alone are finished"
    write(grid)
    (one,) = grid.crossings
    (one.cells[7].folder / "summary.json").unlink()
    report = reported(path)
    (study,) = report.crossings
    assert study.title == "a: 7 of 8 cells of depths alone are finished"
    assert study.sentences == [
        "7 of 8 cells of depths alone are finished; what grows waits until all of them are."
    ]
    assert len(study.pairs) == 3
    assert lines_at(drawn[0]) == [[], []]


def test_depths_that_do_not_cross(tmp_path: Path, drawn: list[Figure]) -> None:
    path = crossing_file(tmp_path)
    grid = load_grid(path)
    for cell in grid.cells:
        if cell.arm == ALONE:
            shallow = cell.config.model.num_layers == 2
            write_run(cell.config, alone_loss(cell, 0, PLANTED) * (1.02 if shallow else 1))
    report = reported(path)
    (study,) = report.crossings
    assert study.crossing is not None
    assert study.crossing.lower == "deep"
    assert "4 layers end lower at all budgets. So nothing is grown" in study.sentences[0]
    assert study.sentences[0].startswith("No crossing between ")
    assert study.around == []
    assert lines_at(drawn[0]) == [[], []]
    page = (report.grid.folder / "report.html").read_text()
    assert "4 layers end lower at all budgets" in page


def test_each_size_has_its_own_panels(tmp_path: Path, drawn: list[Figure]) -> None:
    sizes: list[dict[str, Any]] = [
        {"name": name, "to_layers": 4, "model.num_attention_heads": 2, "optim.lr": rate}
        for name, rate in (("a", 0.01), ("b", 0.02))
    ]
    path = crossing_file(tmp_path, sizes=sizes)
    write(load_grid(path))
    report = reported(path)
    assert [study.size for study in report.crossings] == ["a", "b"]
    assert len(drawn[0].axes) == 4
