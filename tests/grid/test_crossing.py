"""The crossing study: its cells, what waits for the crossing, and what is done where there is none.
Runs are made up, but for one small study that really trains."""

from __future__ import annotations

import json
import math
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive.grid import run as grid_run
from megatron_progressive.grid.cells import ALONE, SCRATCH
from megatron_progressive.grid.crossing import WAITS
from megatron_progressive.grid.grid import Grid, load_grid
from megatron_progressive.grid.launch import Launch
from megatron_progressive.grid.run import run_grid
from megatron_progressive.grid.state import NO_CROSSING, Attempts, Study
from megatron_progressive.grid.submit import JobOptions, plan_jobs
from megatron_progressive.grid.text import plan
from tests.grid.test_grid import grid_file
from tests.jobs import Jobs
from tests.runs.synthetic import alone_loss, write_run, write_study

NOTHING = Launch(srun="false")  # nothing is left to train
BUDGETS = [1e9, 2e9, 4e9, 8e9]
PLANTED = 3e9
SIZE = {"name": "a", "to_layers": 4, "model.num_attention_heads": 2}


def crossing_file(folder: Path, corpus: Path | None = None, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "sizes": [SIZE],
        "arms": ["2_layers", "short_control", "never_grown"],
        "crossing": {"source": 2, "budgets": BUDGETS, "around": [0.5, 1]},
        **changes,
    }
    return grid_file(folder, corpus, **values)


def silent(line: str) -> None:
    pass


def write_alone(grid: Grid, above: float | None = None) -> None:
    """The finished depths alone, which cross at ``PLANTED`` FLOPs; with ``above``, the shallow one
    ends by this share above the deep one at all budgets."""
    for cell in grid.cells:
        if cell.arm != ALONE:
            continue
        loss = alone_loss(cell, 4, PLANTED)
        if above is not None:
            shallow = cell.config.model.num_layers == 2
            loss = 3.0 * (1 + above * shallow) + (0.001 * (cell.config.train.steps % 3))
        write_run(cell.config, loss)


def test_cells_and_their_names(tmp_path: Path) -> None:
    grid = load_grid(crossing_file(tmp_path, seeds=[1, 2], schedule=["wsd", "cosine"]))
    names = [cell.name for cell in grid.cells]
    assert len(set(names)) == len(names)
    # of each schedule and seed: 2 depths at 4 budgets; at 2 multiples an arm and its 2 controls
    assert len(names) == 4 * (2 * 4 + 2 * 3)
    assert {"a-alone-2-1e9-s1", "a-alone-4-8e9-cosine-s2"} < {*names}
    assert "a-2_layers-tau0.5-copying-x0.5-cosine-s2" in names
    assert "a-short_control_of_2_layers-tau0.5-copying-x1-s1" in names
    assert "a-never_grown_of_2_layers-tau0.5-copying_2-x1-s1" in names
    by_name = {cell.name: cell for cell in grid.cells}
    for cell in grid.cells:
        if cell.control_of is not None:
            grown = by_name[cell.control_of]
            assert (grown.axes, grown.seed) == (cell.axes, cell.seed)
    assert len(grid.crossings) == 2
    for one in grid.crossings:
        assert len(one.pairs) == 4 * 2
        for shallow, deep in one.pairs:
            assert shallow.seed == deep.seed
            layers = [c.config.model.num_layers for c in (shallow, deep)]
            assert layers == [2, 4]
            assert not shallow.config.expansion + deep.config.expansion


def test_a_budget_pays_for_all_steps_of_a_depth(tmp_path: Path) -> None:
    grid = load_grid(crossing_file(tmp_path))
    (one,) = grid.crossings
    for (shallow, deep), budget in zip(one.pairs, BUDGETS, strict=True):
        for cell in (shallow, deep):
            step = cell.flops / cell.config.train.steps
            assert budget - step < cell.flops <= budget
            assert cell.config.train.stop_after is None


def test_what_grows_waits_and_is_priced_at_the_budgets_mean(tmp_path: Path) -> None:
    grid = load_grid(crossing_file(tmp_path))
    waiting = [cell for cell in grid.cells if cell.arm != ALONE]
    assert {cell.unknown for cell in waiting} == {WAITS}
    assert {cell.fingerprint for cell in waiting} == {""}
    mean = math.prod(BUDGETS) ** 0.25
    for cell in waiting:
        target = float(cell.axes["around"]) * mean
        step = cell.flops / cell.config.train.steps * 2  # of the full depth, or more
        assert target - 2 * step < cell.flops <= target
    text = plan(grid)
    assert "6 cells wait for it; priced around 2.83e+09 FLOPs, the geometric mean of" in text
    assert "2 and 4 layers alone at 4 budgets, 1.00e+09 to 8.00e+09 FLOPs: 2.98e+10" in text
    states = {one.cell.name: one.state for one in Study(grid).status()}
    assert {states[cell.name] for cell in waiting} == {WAITS}
    assert {states[cell.name] for cell in grid.cells if cell.arm == ALONE} == {"waiting"}
    assert not (tmp_path / "studies").exists()


def test_the_crossing_gives_steps_within_one_of_its_flops(tmp_path: Path) -> None:
    path = crossing_file(tmp_path, arms=["2_layers", "gradual_stack", "short_control"],
                         tau=[0.4, 0.7])  # fmt: skip
    before = load_grid(path)
    write_alone(before)
    grid = load_grid(path)
    (one,) = grid.crossings
    found = one.found()
    assert found is not None
    at = found.compute.value
    assert at == pytest.approx(PLANTED, rel=0.1)
    assert [cell.name for cell in grid.cells] == [cell.name for cell in before.cells]
    assert not any(cell.unknown for cell in grid.cells)
    grown = [cell for cell in grid.cells if cell.arm not in SCRATCH]
    assert len(grown) == 2 * 3
    for cell in grown:
        target = float(cell.axes["around"]) * (at or 0)
        more = replace(
            cell, config=replace(cell.config, train=replace(cell.config.train,
                                                            steps=cell.config.train.steps + 1))
        )  # fmt: skip
        assert cell.flops <= target < more.flops
        assert cell.config.run.name == f"{cell.name}-{cell.fingerprint}"
    assert f"cross at {at:.2e} FLOPs" in plan(grid)
    # one that is not there any more: they wait again
    shutil.rmtree(one.cells[0].folder)
    assert {c.unknown for c in load_grid(path).cells if c.arm not in SCRATCH} == {WAITS}


@pytest.mark.parametrize(
    ("above", "words"),
    [(0.03, "4 layers end lower at all budgets"), (-0.03, "2 layers end lower at all budgets")],
)
def test_without_a_crossing_nothing_grows(
    tmp_path: Path, corpus: Path, above: float, words: str
) -> None:
    path = crossing_file(tmp_path, corpus)
    write_alone(load_grid(path), above)
    grid = load_grid(path)
    said: list[str] = []
    assert run_grid(Study(grid), 1, NOTHING, said.append) == 3
    waiting = [cell for cell in grid.cells if cell.arm != ALONE]
    for cell in waiting:
        assert words in cell.unknown
        assert cell.unknown.startswith("no crossing between ")
        assert f"{cell.name}: not run: {cell.unknown}" in said
        assert Study(grid).status_of(cell).state == NO_CROSSING
        assert not cell.folder.exists()
    assert f"6 cells are not run: {waiting[0].unknown}" in plan(grid)
    assert plan_jobs(Study(grid), JobOptions()) == []


def test_noise_that_hides_the_crossing_is_the_reason(tmp_path: Path) -> None:
    path = crossing_file(tmp_path)
    grid = load_grid(path)
    (one,) = grid.crossings
    for (shallow, deep), apart in zip(one.pairs, (0.3, 0.02, 0.25, 0.04), strict=True):
        write_run(shallow.config, 3.0 + apart)
        write_run(deep.config, 3.0)
    reasons = {cell.unknown for cell in load_grid(path).cells} - {""}
    (reason,) = reasons
    assert "noise hides which of 2 and 4 layers ends lower: more seeds, or budgets" in reason


def test_another_size_is_found_for_itself(tmp_path: Path) -> None:
    path = crossing_file(tmp_path, sizes=[SIZE, {"name": "b", "to_layers": 6,
                                                 "model.num_attention_heads": 2}])  # fmt: skip
    grid = load_grid(path)
    for cell in grid.cells:
        if cell.arm == ALONE and cell.size == "a":
            write_run(cell.config, alone_loss(cell, 4, PLANTED))
    waits = {(cell.size, cell.unknown) for cell in load_grid(path).cells if cell.arm != ALONE}
    assert waits == {("a", ""), ("b", WAITS)}


def test_the_depths_alone_run_first_then_the_rest(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = crossing_file(tmp_path, corpus)
    order: list[str] = []

    def made_up(study: Study, cell: Any, launch: Launch, signals: Any) -> int:
        order.append(cell.name)
        loss = alone_loss(cell, 4, PLANTED) if cell.arm == ALONE else 3.0
        write_run(cell.config, loss)
        return 0

    monkeypatch.setattr(grid_run, "run_cell", made_up)
    said: list[str] = []
    assert run_grid(Study(load_grid(path)), 1, NOTHING, said.append, ["a-alone-2-1e9-s1"]) == 0
    assert order == ["a-alone-2-1e9-s1"]
    # a cell that waits needs the others
    grown = "a-2_layers-tau0.5-copying-x1-s1"
    assert run_grid(Study(load_grid(path)), 1, NOTHING, said.append, [grown]) == 0
    assert len(order) == 9
    assert order[-1] == grown
    assert any(line.startswith("crossing of a (wsd): 2 and 4 layers cross at ") for line in said)
    assert run_grid(Study(load_grid(path)), 2, NOTHING, said.append) == 0
    assert sorted(order) == sorted(cell.name for cell in load_grid(path).cells)
    assert said[-1] != f"{grown}: not run: {WAITS}"


def test_what_grows_is_not_run_where_a_depth_alone_fails(tmp_path: Path, corpus: Path) -> None:
    path = crossing_file(tmp_path, corpus)
    study = Study(load_grid(path))
    write_alone(study.grid)
    (one,) = study.grid.crossings
    failed = one.cells[3]
    shutil.rmtree(failed.folder)
    study.remember(failed, Attempts(failures=3, error="boom"))
    said: list[str] = []
    assert run_grid(study, 1, NOTHING, said.append) == 1
    assert f"small: cells around the crossing are not run: {failed.name} failed" in said
    grown = "a-2_layers-tau0.5-copying-x1-s1"
    assert f"{grown}: not run: {WAITS}" in said
    assert run_grid(study, 1, NOTHING, said.append, [grown]) == 1  # it may yet run


def test_depths_that_run_elsewhere_are_waited_for(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_run, "POLL_SECONDS", 0.05)
    path = crossing_file(tmp_path, corpus)
    study = Study(load_grid(path))
    write_alone(study.grid)
    (one,) = study.grid.crossings
    last = one.cells[5]
    loss = alone_loss(last, 4, PLANTED)
    shutil.rmtree(last.folder)
    held, waits = threading.Event(), threading.Event()
    said: list[str] = []
    started: list[str] = []

    def made_up(study: Study, cell: Any, launch: Launch, signals: Any) -> int:
        started.append(cell.name)
        write_run(cell.config, 3.0)
        return 0

    monkeypatch.setattr(grid_run, "run_cell", made_up)

    def elsewhere() -> None:
        with study.lock(last):
            held.set()
            waits.wait(60)
            write_run(last.config, loss)

    def say(line: str) -> None:
        said.append(line)
        if "run elsewhere:" in line:
            waits.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    held.wait(60)
    assert run_grid(study, 1, NOTHING, say) == 0
    thread.join()
    at = said.index("small: depths alone run elsewhere: waiting for them")
    assert said[at + 1].startswith("crossing of a (wsd): 2 and 4 layers cross at ")
    assert last.name not in started
    assert len(started) == 6


def test_jobs_in_two_arrays(tmp_path: Path) -> None:
    path = crossing_file(tmp_path)
    study = Study(load_grid(path))
    alone, cells, report = plan_jobs(study, JobOptions(array_limit=3))
    assert [job.name for job in (alone, cells, report)] == ["alone", "cells", "report"]
    assert alone.cells == [cell.name for cell in study.grid.cells if cell.arm == ALONE]
    assert cells.cells == [cell.name for cell in study.grid.cells if cell.arm != ALONE]
    assert "--array=0-7%3" in alone.options
    assert "--array=0-5%3" in cells.options
    assert alone.script[1] == cells.script[1] == "cell"
    assert alone.cells_file != cells.cells_file
    numbers = {"alone": "7", "cells": "8"}
    assert "--dependency=afterany:7" in cells.command(numbers)
    assert "--dependency=afterany:8" in report.command(numbers)
    write_alone(study.grid)
    cells, report = plan_jobs(Study(load_grid(path)), JobOptions())
    assert cells.after is None
    assert len(cells.cells) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crossing": {"sources": 2, "budgets": BUDGETS}}, "crossing.sources: unknown key; "),
        ({"crossing": [2]}, "crossing: got [2]; accepted: a mapping"),
        ({"crossing": {"budgets": BUDGETS}}, "crossing.source: got none; accepted: a number of la"),
        ({"crossing": {"source": 4, "budgets": BUDGETS}},
         "crossing.source: got 4 with 4 layers of size a; accepted: fewer layers than to_layers"),
        ({"crossing": {"source": -1, "budgets": BUDGETS}}, "crossing.source: got -1; accepted: "),
        ({"crossing": {"source": 2, "budgets": BUDGETS[:2]}},
         "crossing.budgets: got 2; accepted: at least 3 different numbers of FLOPs"),
        ({"crossing": {"source": 2, "budgets": [1e9, 1e9, 2e9]}}, "crossing.budgets: got 1e+09 tw"),
        ({"crossing": {"source": 2, "budgets": 1e9}}, "crossing.budgets: got 1000000000.0; acc"),
        ({"crossing": {"source": 2, "budgets": [1e9, 0, 2e9]}}, "crossing.budgets: got 0; acc"),
        ({"crossing": {"source": 2, "budgets": [1e3, 1e9, 2e9]}},
         "crossing.budgets: got 1000, which pays for no step of size a with 2 layers"),
        ({"crossing": {"source": 2, "budgets": [1e9, 1.001e9, 1.002e9]}}, "pay for 1 different"),
        ({"crossing": {"source": 2, "budgets": BUDGETS, "around": []}}, "around: got none"),
        ({"crossing": {"source": 2, "budgets": BUDGETS, "around": [-1]}}, "around: got -1"),
        ({"crossing": {"source": 2, "budgets": BUDGETS, "around": [0.05]}},
         "as the least budget times the least of crossing.around, too few for what grows"),
        ({"arms": ["short_control", "never_grown"]},
         "arms: got short_control, never_grown with crossing, none of which grows; "),
        ({"arms": ["fixed", "2_layers"]}, "arms: got fixed with crossing; accepted: arms that "),
        ({"arms": ["alone", "2_layers"]}, "arms: got 'alone'; accepted: fixed, zero_layer"),
        ({"tau": ["pilot"]}, "tau: got pilot with crossing; accepted: fractions"),
        ({"tau": [20]}, "tau: got 20 with crossing; accepted: fractions"),
        ({"pilot": {"steps": 20}, "arms": ["one_layer"]}, "pilot: got one with crossing; accepted"),
    ],
)  # fmt: skip
def test_bad_crossings(tmp_path: Path, capsys: Any, changes: dict[str, Any], words: str) -> None:
    path = crossing_file(tmp_path, **changes)
    assert cli.main(["grid", "run", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_words_of_the_crossing_are_the_grids(tmp_path: Path) -> None:
    path = crossing_file(tmp_path)
    grid = load_grid(path, ["crossing.budgets=[2e9,4e9,8e9]", "crossing.around=[1]"])
    assert len(grid.cells) == 2 * 3 + 3


def test_the_real_thing(jobs: Jobs, tmp_path: Path, corpus: Path) -> None:
    """A few steps of each run, from depths alone to the report."""
    path = crossing_file(
        tmp_path, corpus, crossing={"source": 2, "budgets": [3e8, 6e8, 1.2e9], "around": [1]},
        expansion={"order": ["stack"]},
    )  # fmt: skip
    prepare = ("tests.grid.forked", "prepare", (str(path), None, 0))
    run = jobs.run(1, tmp_path, ["grid", "run", str(path), "--workers", "2"], prepare)
    grid = load_grid(path)
    (one,) = grid.crossings
    found = one.found()
    assert found is not None, run.output
    crosses = found.compute.value is not None
    assert run.codes == [0 if crosses else 3], run.output
    assert cli.main(["grid", "report", str(path)]) == 0
    values = json.loads((grid.folder / "report.json").read_text())
    assert values["complete"] is crosses
    (study,) = values["crossings"]
    assert len(study["pairs"]) == 3
    assert (grid.folder / "crossing.png").is_file()
    for pair in study["pairs"]:  # as the engines counted while they trained
        assert abs(pair["flops"] / float(pair["budget"]) - 1) < 0.25


def test_study_of_made_up_runs_is_complete(tmp_path: Path) -> None:
    path = crossing_file(tmp_path)
    write_study(load_grid(path), crossing=PLANTED)
    write_study(load_grid(path))
    study = Study(load_grid(path))
    assert all(study.finished(cell) for cell in study.grid.cells)
