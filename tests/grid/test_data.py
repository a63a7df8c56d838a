"""What a study is trained on: settled once, for all of its cells. No training: run folders are made
up."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive import data as data_room
from megatron_progressive.compare.report import make_report
from megatron_progressive.config import ConfigError, load
from megatron_progressive.data import DATA_FILE, DataIdentity, read_identity
from megatron_progressive.grid.data import StudyData, data_key
from megatron_progressive.grid.fingerprint import fingerprint
from megatron_progressive.grid.grid import load_grid
from megatron_progressive.grid.report.report import make_grid_report
from megatron_progressive.grid.run import Launch, run_grid
from megatron_progressive.grid.state import Study
from megatron_progressive.runtime.files import write_json
from tests.data.small_corpora import make_documents, write_json_lines
from tests.runs.synthetic import four_arms, progressive_config, write_run, write_study

NOTHING = Launch(srun="false")  # no cell can run

TEXTS = make_documents(60)


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    write_json_lines(tmp_path / "c.jsonl", TEXTS)
    values = {
        "study": {"name": "small", "dir": str(tmp_path / "studies"), "retries": 0},
        "run": {
            "model": {"family": "gpt2", "hidden_size": 32},
            "data": {"corpus": str(tmp_path / "c.jsonl"), "vocab_size": 300, "sequence_length": 8,
                     "validation_fraction": 0.2},
            "train": {"steps": 40, "global_batch": 4, "micro_batch": 4, "eval_every": 20,
                      "eval_samples": 4},
        },
        "sizes": [{"name": "a", "to_layers": 2}],
        "arms": ["fixed", "zero_layer", "short_control"],
        "tau": [0.5],
    }  # fmt: skip
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(grid: Path, *chosen: str) -> list[str]:
    """Run the grid, whose cells all fail at once; returns what it said."""
    said: list[str] = []
    attempts = load_grid(grid).folder / "attempts"
    shutil.rmtree(attempts, ignore_errors=True)
    run_grid(Study(load_grid(grid)), 1, NOTHING, said.append, chosen)
    return said


def started(grid: Path) -> dict[str, str | None]:
    """What each cell that has been started was given as its prepared corpus."""
    folder = load_grid(grid).folder / "configs"
    return {path.stem: load(path).data.prepared for path in folder.glob("*.yaml")}


def extend(grid: Path, text: str = "more") -> None:
    with open(grid.parent / "c.jsonl", "a") as file:
        file.write(json.dumps({"text": text}) + "\n")


def test_all_cells_have_what_the_first_one_had(grid: Path, tmp_path: Path) -> None:
    before = load_grid(grid).cells
    assert {cell.trained_on for cell in before} == {None}
    run(grid, "0")
    known = load_grid(grid).cells[0].trained_on
    assert known is not None
    for cell in load_grid(grid).cells:
        assert cell.trained_on == known
        assert cell.fingerprint == fingerprint(cell.config, known) != fingerprint(cell.config)
    # names stay: they were given before it was known
    assert [c.folder for c in load_grid(grid).cells] == [c.folder for c in before]
    extend(grid)
    said = run(grid)
    assert sum("has changed since study" in line for line in said) == 1
    assert str(known.prepared) in said[0]
    assert started(grid).keys() == {cell.folder.name for cell in before}
    assert set(started(grid).values()) == {known.prepared}
    assert len(list((tmp_path / "studies/small/cells/data").iterdir())) == 1
    # to look at it takes no corpus
    (tmp_path / "c.jsonl").unlink()
    for verb in ("plan", "status", "collect", "report"):
        assert cli.main(["grid", verb, str(grid)]) == 0
    assert {cell.trained_on for cell in load_grid(grid).cells} == {known}


def test_a_touched_corpus_undoes_nothing(grid: Path) -> None:
    run(grid, "0")
    first = [cell.fingerprint for cell in load_grid(grid).cells]
    os.utime(grid.parent / "c.jsonl", (1, 1))
    run(grid)
    assert [cell.fingerprint for cell in load_grid(grid).cells] == first


def test_other_data_is_another_study(grid: Path, tmp_path: Path, capsys: Any) -> None:
    run(grid, "0")
    known = load_grid(grid).cells[0].trained_on
    assert known is not None
    extend(grid)
    words = ["grid", "run", str(grid)]
    other = replace(load_grid(grid).cells[0].config)
    folder = data_room.prepare(other)
    capsys.readouterr()
    assert cli.main([*words, f"data.prepared={folder}"]) == 2
    line = capsys.readouterr().err.strip()
    for part in ("data.prepared: got", str(folder), str(known.prepared), "a new study.name"):
        assert part in line
    # the corpus as it was is gone, too
    shutil.rmtree(known.prepared or "")
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for part in ("data.corpus: got", "c.jsonl", str(known.prepared), "a new study.name"):
        assert part in line
    assert {cell.trained_on for cell in load_grid(grid).cells} == {known}
    # a study that is moved goes on where it is
    assert run_grid(Study(load_grid(grid, ["study.name=new"])), 1, NOTHING, print) == 1
    (tmp_path / "studies/new").rename(tmp_path / "studies/moved")
    extend(grid, "and more")
    moved = load_grid(grid, ["study.name=moved"])
    shutil.rmtree(moved.folder / "attempts")
    assert run_grid(Study(moved), 1, NOTHING, print) == 1
    again = load_grid(grid, ["study.name=moved"]).cells[0].trained_on
    assert again is not None
    assert Path(again.prepared or "").is_relative_to(tmp_path / "studies/moved")


def test_settled_anew_finished_cells_are_of_other_data(grid: Path) -> None:
    run(grid)
    known = load_grid(grid).cells[0].trained_on
    assert known is not None
    for cell in load_grid(grid).cells:
        write_run(cell.config, 3.0)
        write_json(cell.folder / DATA_FILE, known.to_values())
    study = Study(load_grid(grid))
    assert all(study.finished(cell) for cell in study.grid.cells)
    (said,) = run(grid)
    assert "nothing to do, all 3 cells are finished" in said
    shutil.rmtree(study.folder / "data")
    extend(grid)
    run(grid)  # all are finished: nothing to settle
    assert not (study.folder / "data").exists()
    shutil.rmtree(study.grid.cells[0].folder)
    run(grid)
    again = Study(load_grid(grid))
    assert not any(again.finished(cell) for cell in again.grid.cells)
    names = {cell.folder.name for cell in study.grid.cells[1:]}
    assert not names & {cell.folder.name for cell in again.grid.cells}


def test_studies_of_before_it_was_recorded(grid: Path, capsys: Any) -> None:
    plan = load_grid(grid)
    old = data_room.prepare(plan.cells[0].config)
    for cell in plan.cells[1:]:
        write_run(cell.config, 3.0)
    now = time.time()
    for path in plan.folder.rglob("*"):
        os.utime(path, (now - 50, now - 50))
    report = make_grid_report(Study(load_grid(grid)))  # as it was
    assert sum(result.loss is not None for result in report.results) == 2
    said = run(grid)
    assert "was trained on before was not recorded" in said[0]
    study = Study(load_grid(grid))
    assert [study.finished(cell) for cell in study.grid.cells] == [False, True, True]
    assert Path(study.grid.cells[0].trained_on.prepared or "") == old  # type: ignore[union-attr]
    # the corpus has changed since: nobody may mix
    shutil.rmtree(study.folder / "data")
    extend(grid)
    capsys.readouterr()
    shutil.rmtree(study.folder / "attempts")
    assert cli.main(["grid", "run", str(grid)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    for part in ("data.corpus: got", f"data.prepared={old}", "a new study.name"):
        assert part in line
    assert not (study.folder / "data").exists()


def test_of_several_workers_the_first_one_settles(grid: Path, tmp_path: Path) -> None:
    config, store = load_grid(grid).cells[0].config, StudyData(tmp_path / "study")
    found: list[DataIdentity] = []

    def settle(number: int) -> None:
        identity = DataIdentity(f"{number}", "c", None, None)
        found.append(store._record(config, identity))

    threads = [threading.Thread(target=settle, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert store.known(config) == found[0]
    assert [path.name for path in (tmp_path / "study/data").iterdir()] == [
        f"{data_key(config)}.json"
    ]
    (tmp_path / f"study/data/{data_key(config)}.json").write_text("")
    with pytest.raises(ConfigError, match=r"study: .* cannot be read"):
        store._record(config, found[0])


def test_sizes_with_other_vocabularies_have_their_own(grid: Path) -> None:
    values = yaml.safe_load(grid.read_text())
    values["sizes"].append({"name": "b", "to_layers": 2, "data.vocab_size": 310})
    values["sizes"].append({"name": "c", "to_layers": 2, "data.sequence_length": 16})
    grid.write_text(yaml.safe_dump(values))
    run(grid)
    found = {cell.size: cell.trained_on for cell in load_grid(grid).cells}
    assert None not in found.values()
    assert found["a"] == found["c"] != found["b"]


def test_reports_leave_out_cells_on_other_data(grid: Path) -> None:
    plan = load_grid(grid)
    write_study(plan)
    for number, cell in enumerate(plan.cells):
        identity = DataIdentity("b" if number == 1 else "a", "c", None, None)
        write_json(cell.folder / DATA_FILE, identity.to_values())
    report = make_grid_report(Study(load_grid(grid)))
    assert [result.problem for result in report.results] == [
        "", "trained on other data than the study", "",
    ]  # fmt: skip
    assert not report.complete
    assert report.findings == []
    assert "trained on other data than the study" in (plan.folder / "report.html").read_text()


def test_runs_on_other_data_are_not_compared(tmp_path: Path) -> None:
    folders = four_arms(tmp_path / "runs", content="a")
    report = make_report(list(folders.values()), tmp_path / "out")
    assert (report.complete, report.notes) == (True, [])
    short = folders["short"]
    identity = read_identity(short / DATA_FILE)
    assert identity is not None
    write_json(short / DATA_FILE, replace(identity, fingerprint="b").to_values())
    report = make_report(list(folders.values()), tmp_path / "out")
    assert not report.complete
    assert [missing.arm for missing in report.missing] == ["short control"]
    assert report.notes == [
        "tiny_short was trained on other data than tiny, under the same name: not compared"
    ]
    # by content alone, whatever it is called
    config = (short / "config.yaml").read_text().replace("corpus: stdlib", "corpus: other")
    (short / "config.yaml").write_text(config)
    write_json(short / DATA_FILE, identity.to_values())
    report = make_report(list(folders.values()), tmp_path / "out")
    assert report.complete
    # unknown: by name, and said
    for folder in folders.values():
        (folder / DATA_FILE).unlink()
    config = config.replace("corpus: other", "corpus: stdlib")
    (short / "config.yaml").write_text(config)
    report = make_report(list(folders.values()), tmp_path / "out")
    assert report.complete
    assert report.notes == [
        "What tiny, tiny_fixed, tiny_short, tiny_never_grown_0 had for data was not recorded: "
        "their corpora are compared by name alone"
    ]


def test_a_control_is_asked_for_on_what_the_run_was_trained_on(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "c.jsonl", TEXTS)
    config = progressive_config(tmp_path / "runs")
    data = replace(config.data, corpus=str(corpus), vocab_size=300, validation_fraction=0.2)
    config = replace(config, data=data)
    identity, _ = data_room.settle(config)
    folder = write_run(config, 2.5)
    write_json(folder / DATA_FILE, identity.to_values())
    for changed in (False, True):
        report = make_report([folder], tmp_path / "out")
        for missing in report.missing:
            assert (f"data.prepared={identity.prepared}" in missing.command) is changed
        corpus.write_text(corpus.read_text() + json.dumps({"text": "more"}) + "\n")


def test_a_pilot_on_other_data_is_no_result(tmp_path: Path) -> None:
    from megatron_progressive.compare.pilot import measure, plan_pilot, recorded

    config = progressive_config(tmp_path / "runs")
    pilot = plan_pilot(replace(config, train=replace(config.train, steps=1000)))
    for arm, content in ((pilot.fixed, "a"), (pilot.progressive, "b")):
        train = replace(arm.train, steps=arm.last_step, stop_after=None)
        write_run(replace(arm, train=train), 3.0, content=content)
    with pytest.raises(ConfigError, match="were trained on different data"):
        measure(config, pilot)
    values = read_identity(pilot.fixed.folder / DATA_FILE)
    assert values is not None
    write_json(pilot.progressive.folder / DATA_FILE, values.to_values())
    measure(config, pilot)
    assert recorded(pilot) is not None
    assert recorded(pilot, values) is not None
    assert recorded(pilot, replace(values, fingerprint="b")) is None
