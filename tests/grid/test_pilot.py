"""A pilot inside a grid: the τ that follows, and what is done where none does. No training: the
pilot's runs are made up."""

from __future__ import annotations

import math
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive.grid import run as grid_run
from megatron_progressive.grid.grid import Grid, load_grid
from megatron_progressive.grid.launch import Launch
from megatron_progressive.grid.pilot import WAITS
from megatron_progressive.grid.report.report import make_grid_report
from megatron_progressive.grid.run import run_grid, run_pilot
from megatron_progressive.grid.state import NO_TAU, PENDING, Study
from megatron_progressive.grid.text import plan
from megatron_progressive.runs.folder import read_metrics
from tests.runs.synthetic import write_run, write_study

NOTHING = Launch(srun="false")  # nothing is left to train


def grid_file(folder: Path, corpus: Path | None = None, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "study": {"name": "study", "dir": str(folder / "studies"), "retries": 0},
        "run": {
            "model": {"family": "gpt2", "hidden_size": 32},
            "data": {"vocab_size": 512, "sequence_length": 32,
                     "prepared": str(corpus) if corpus else None},
            "train": {"steps": 1000, "global_batch": 16, "eval_every": 100},
            "schedule": {"decay": 0.1},
        },
        "sizes": [{"name": "b", "to_layers": 4},
                  {"name": "a", "to_layers": 2, "train.global_batch": 32, "train.steps": 800}],
        "arms": ["fixed", "zero_layer", "short_control"],
        "tau": [0.5, "pilot"],
        **changes,
    }  # fmt: skip
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value != {}}))
    return path


def write_pilot(grid: Grid, final: float) -> None:
    """Its two finished runs: fixed-size ends at 3, the other one at ``final``."""
    assert grid.pilot is not None
    fixed, progressive = (cell.config for cell in grid.pilot.cells)
    for config, loss in ((fixed, 3.0), (progressive, final)):
        shutil.rmtree(config.folder, ignore_errors=True)
        # the made-up curve's spike is over within a tenth of its steps
        train = replace(config.train, steps=config.last_step, stop_after=None)
        write_run(replace(config, train=train), loss)


def silent(line: str) -> None:
    pass


def test_cells_wait_for_the_pilot_and_are_priced_with_an_assumption(tmp_path: Path) -> None:
    grid = load_grid(grid_file(tmp_path))
    assert grid.pilot is not None
    assert (grid.pilot.size, grid.pilot.source) == ("a", "zero_layer")  # the smallest
    waiting = [cell for cell in grid.cells if cell.unknown]
    assert len(grid.cells) == 10
    assert [cell.name for cell in waiting] == [
        f"{size}-{what}zero_layer-taupilot-random-s1"
        for size in "ba"
        for what in ("", "short_control_of_")
    ]
    assert {cell.fingerprint for cell in waiting} == {""}
    text = plan(grid)
    assert "4 cells wait for it; priced with τ at 0.8 of the stable phase's end" in text
    # 0.8 of 900, and of 720
    assert [c.config.expansion_steps() for c in waiting if c.config.expansion] == [[720], [576]]
    states = {one.cell.name: one.state for one in Study(grid).status()}
    assert [states[cell.name] for cell in waiting] == [PENDING] * 4
    assert states["pilot-fixed"] == states["pilot-progressive"] == "waiting"
    assert not (tmp_path / "studies").exists()


def test_the_mixing_time_is_carried_over_in_tokens(tmp_path: Path, capsys: Any) -> None:
    path = grid_file(tmp_path)
    before = load_grid(path)
    write_pilot(before, 3.0)
    assert cli.main(["grid", "pilot", str(path)]) == 0
    assert "pilot: Mixed " in capsys.readouterr().out
    grid = load_grid(path)
    assert grid.pilot is not None
    mixing = grid.pilot.mixing()
    assert mixing is not None
    assert mixing.tokens is not None
    assert [cell.name for cell in grid.cells] == [cell.name for cell in before.cells]
    taus = {c.size: c.config.expansion_steps()[0] for c in grid.cells if c.tau == "pilot"
            and c.config.expansion}  # fmt: skip
    assert taus == {
        "b": 900 - math.ceil(mixing.tokens / (16 * 32)),
        "a": 720 - math.ceil(mixing.tokens / (32 * 32)),
    }
    assert 900 - taus["b"] == 2 * (720 - taus["a"]) > 40
    for cell in grid.cells:
        assert cell.config.run.name == f"{cell.name}-{cell.fingerprint}"
    # its runs may go: the result stays, until something that decides it changes
    for cell in grid.pilot.cells:
        shutil.rmtree(cell.folder)
    assert cli.main(["grid", "pilot", str(path)]) == 0
    assert not any(cell.folder.exists() for cell in grid.pilot.cells)
    values = yaml.safe_load(path.read_text())
    values["run"]["optim"] = {"lr": 0.02}
    path.write_text(yaml.safe_dump(values))
    assert {cell.unknown for cell in load_grid(path).cells} == {"", WAITS}


def test_a_longer_pilot_is_another_result(tmp_path: Path) -> None:
    path = grid_file(tmp_path, pilot={"steps": 160})
    write_pilot(load_grid(path), 3.0)
    assert run_pilot(Study(load_grid(path)), 1, NOTHING, silent) == 0
    longer = load_grid(grid_file(tmp_path, pilot={"steps": 400}))
    assert {cell.unknown for cell in longer.cells} == {"", WAITS}
    assert longer.pilot is not None
    assert longer.pilot.cells[0].folder.is_dir()  # the same run, which goes on
    assert not Study(longer).finished(longer.pilot.cells[0])
    shorter = load_grid(grid_file(tmp_path, pilot={"steps": 120}))
    assert {cell.unknown for cell in shorter.cells} == {""}


def test_not_mixed_is_an_answer_and_the_other_cells_run(tmp_path: Path, corpus: Path) -> None:
    path = grid_file(tmp_path, corpus)
    grid = load_grid(path)
    write_pilot(grid, 3.3)
    write_study(grid)  # all cells that have a τ
    said: list[str] = []
    assert run_grid(Study(grid), 1, NOTHING, said.append) == 3
    grid = load_grid(path)
    unknown = [cell for cell in grid.cells if cell.unknown]
    assert len(unknown) == 4
    for cell in unknown:
        assert cell.unknown.startswith("the pilot: not mixed within ")
        assert "above fixed-size" in cell.unknown
        assert f"{cell.name}: not run: {cell.unknown}" in said
        assert Study(grid).status_of(cell).state == NO_TAU
        assert not cell.folder.exists()
    assert run_pilot(Study(grid), 1, NOTHING, silent) == 3
    # a cell that is not there to run counts as a failure, and comes first
    shutil.rmtree(grid.cells[0].folder)
    assert run_grid(Study(grid), 1, NOTHING, silent) == 1
    assert run_grid(Study(grid), 1, NOTHING, silent, ["1"]) == 0
    assert run_grid(Study(grid), 1, NOTHING, silent, [unknown[0].name]) == 3


def test_its_runs_start_as_cells_do_and_the_rest_goes_on_without_them(
    tmp_path: Path, corpus: Path
) -> None:
    path = grid_file(tmp_path, corpus, study={"name": "study", "dir": str(tmp_path / "studies"),
                                             "retries": 1})  # fmt: skip
    script = tmp_path / "srun.py"
    script.write_text(
        "import sys; open(sys.argv[1], 'a').write(sys.argv[-1] + '\\n'); sys.exit('rank 0: X: no')"
    )
    launch = Launch(srun=f"{sys.executable} {script} {tmp_path / 'started'}")
    said: list[str] = []
    assert run_grid(Study(load_grid(path)), 1, launch, said.append) == 1
    grid = load_grid(path)
    assert grid.pilot is not None
    started = [Path(line).stem for line in (tmp_path / "started").read_text().split()]
    pilots = [cell.config.run.name for cell in grid.pilot.cells]
    assert set(started[:4]) == set(pilots)  # first, and each tried twice
    with_tau = [cell.config.run.name for cell in grid.cells if not cell.unknown]
    assert sorted(started[4:]) == sorted(with_tau * 2)
    assert any(line.startswith("the pilot failed: pilot-") for line in said)
    # one cell that needs it, alone: the pilot comes first; one that does not: it does not
    (tmp_path / "started").unlink()
    assert run_grid(Study(grid), 1, launch, said.append, ["a-fixed-s1"]) == 1
    assert not (tmp_path / "started").exists()  # failed before, as often as it is tried
    for file in (grid.folder / "attempts").iterdir():
        file.unlink()
    assert run_grid(Study(grid), 1, launch, said.append, ["a-fixed-s1"]) == 1
    (name,) = {Path(line).stem for line in (tmp_path / "started").read_text().split()}
    assert name.startswith("a-fixed-s1-")
    assert run_grid(Study(grid), 1, launch, said.append, ["2"]) == 1
    assert pilots[0] in (tmp_path / "started").read_text()


def test_a_pilot_that_runs_elsewhere_is_waited_for(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_run, "POLL_SECONDS", 0.05)
    study = Study(load_grid(grid_file(tmp_path, corpus)))
    assert study.grid.pilot is not None
    held, waits = threading.Event(), threading.Event()
    said: list[str] = []

    def elsewhere() -> None:
        with study.lock(study.grid.pilot.cells[0]), study.lock(study.grid.pilot.cells[1]):  # type: ignore[union-attr]
            held.set()
            waits.wait(60)
            write_pilot(study.grid, 3.0)

    def say(line: str) -> None:
        said.append(line)
        if "elsewhere" in line:
            waits.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    held.wait(60)
    assert run_pilot(study, 1, NOTHING, say) == 0  # which would fail, had it started one
    thread.join()
    assert said[0] == "the pilot runs elsewhere: waiting for it"
    assert said[1].startswith("pilot: Mixed ")


def test_the_report_says_whether_it_came_true(tmp_path: Path) -> None:
    path = grid_file(tmp_path, tau=["pilot"], arms=["fixed", "zero_layer"])
    write_pilot(load_grid(path), 3.0)
    assert run_pilot(Study(load_grid(path)), 1, NOTHING, silent) == 0
    grid = load_grid(path)
    found = grid.pilot.finding() if grid.pilot else ""
    assert found.startswith("Mixed ")
    assert make_grid_report(Study(grid)).pilot == found  # no cell has ended
    for cell in grid.cells:
        meets = cell.arm == "fixed" or cell.size == "a"
        write_run(cell.config, 3.0 if meets else 3.3)
    said = make_grid_report(Study(grid)).pilot
    assert said == f"{found}; runs with τ from it that ended within 0.5 % of fixed-size: 1 of 2"


def test_the_real_thing(tmp_path: Path, corpus: Path) -> None:
    """Twenty-odd steps of two runs, through ``mprog train``."""
    path = grid_file(
        tmp_path, corpus, arms=["zero_layer"], tau=["pilot"], sizes=[{"name": "a", "to_layers": 2}],
        run={"model": {"family": "gpt2", "hidden_size": 32},
             "data": {"vocab_size": 512, "sequence_length": 32, "prepared": str(corpus)},
             "train": {"steps": 40, "global_batch": 4, "micro_batch": 4, "eval_every": 5,
                       "eval_samples": 4}},
        pilot={"steps": 22},
    )  # fmt: skip
    code = run_grid(Study(load_grid(path)), 2, Launch(), silent, ["0"])
    grid = load_grid(path)
    assert grid.pilot is not None
    mixing = grid.pilot.mixing()
    assert mixing is not None
    for cell in grid.pilot.cells:
        steps = [e["step"] for e in read_metrics(cell.folder) if e["event"] == "train"]
        assert steps == list(range(1, 23))
    (cell,) = grid.cells
    assert code == (3 if cell.unknown else 0)
    assert Study(grid).finished(cell) is not bool(cell.unknown)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pilot": {"size": "c"}}, "pilot.size: got 'c'; accepted: b, a"),
        ({"pilot": {"source": "fixed"}}, "pilot.source: got 'fixed'; accepted: zero_layer, one_l"),
        ({"arms": ["fixed", "g_stack"]}, "pilot.source: got none among the arms; accepted: zero_"),
        ({"pilot": {"steps": 5}}, "pilot: pilot.steps: got 5; accepted: a fraction below 1"),
        ({"pilot": {"steps": "long"}}, "pilot.steps: got 'long'; accepted: a fraction"),
        ({"pilot": {"at": 5}}, "pilot: pilot.at: got 5; accepted: a fraction below 1, or a step"),
        ({"pilot": {"at": True}}, "pilot.at: got true; accepted: a fraction below 1, or a step"),
        ({"pilot": {"tau": 5}}, "pilot.tau: unknown key; accepted: size, steps, at, source"),
        ({"pilot": [1]}, "pilot: got [1]; accepted: a mapping"),
        ({"tau": ["early"]}, "tau: got 'early'; accepted: fractions, steps, or pilot"),
        ({"schedule": ["cosine"]}, "schedule.name: got cosine; accepted: wsd"),
        ({"schedule": ["wsd", "cosine"]}, "tau: got pilot with schedule.name cosine; accepted: fr"),
        ({"seeds": ["x"]}, "seeds: got 'x'; accepted: an integer"),
        ({"study": {"retries": -1}}, "study.retries: got -1; accepted: an integer from 0"),
    ],
)
def test_bad_pilots(tmp_path: Path, capsys: Any, changes: dict[str, Any], words: str) -> None:
    path = grid_file(tmp_path, **changes)
    assert cli.main(["grid", "run", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_grid_without_a_pilot_has_none_to_run(tmp_path: Path, capsys: Any) -> None:
    path = grid_file(tmp_path, tau=[0.5])
    assert cli.main(["grid", "pilot", str(path)]) == 2
    assert "pilot: got none in" in capsys.readouterr().err
    assert cli.main(["grid", "run", str(path), "--cell", "12"]) == 2
    assert "--cell: got '12', which " in capsys.readouterr().err
