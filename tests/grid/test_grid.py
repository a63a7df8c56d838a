"""Grids: their cells, and running them through interruptions."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive.cost.flops import total_flops
from megatron_progressive.grid import fingerprint as fingerprints
from megatron_progressive.grid.cells import Cell
from megatron_progressive.grid.grid import load_grid
from megatron_progressive.grid.state import Study
from megatron_progressive.runs.decisive import decisive
from megatron_progressive.runs.folder import read_metrics
from tests.jobs import Jobs


def grid_file(tmp_path: Path, corpus: Path | None = None, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "study": {"name": "small", "dir": str(tmp_path / "studies")},
        "run": {
            "model": {"family": "gpt2", "hidden_size": 32},
            "data": {"vocab_size": 512, "sequence_length": 32,
                     "prepared": str(corpus) if corpus else None},
            "train": {"steps": 40, "global_batch": 4, "micro_batch": 4, "eval_every": 20,
                      "eval_samples": 4, "save_every": 4},
        },
        "sizes": [{"name": "a", "to_layers": 2}, {"name": "b", "to_layers": 4,
                                                  "model.num_attention_heads": 2}],
        "arms": ["fixed", "zero_layer", "short_control"],
        "tau": [0.5],
    }  # fmt: skip
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def test_arms_and_their_controls(tmp_path: Path) -> None:
    arms = ["fixed", "zero_layer", "one_layer", "short_control", "never_grown", "g_stack",
            "gradual_stack", "function_preserving"]  # fmt: skip
    grid = load_grid(grid_file(tmp_path, sizes=[{"name": "a", "to_layers": 8}], arms=arms,
                               tau=[0.4, 0.6], seeds=[1, 2]))  # fmt: skip
    assert len({cell.name for cell in grid.cells}) == len(grid.cells)
    by_name = {cell.name: cell for cell in grid.cells}
    progressive = [cell for cell in grid.cells if cell.config.expansion]
    # 2 seeds x (2 taus x 3 arms from 0 or 1 layers, and the two stackings)
    assert len(progressive) == 2 * (2 * 3 + 2)
    # each with its short control and one for each depth before the full one
    assert len(grid.cells) == 2 * (1 + 2 * 8 + 9)
    for cell in grid.cells:
        if cell.arm in ("short_control", "never_grown"):
            assert cell.control_of is not None
            one_step = cell.flops / cell.config.train.steps
            assert 0 <= by_name[cell.control_of].flops - cell.flops < one_step
        assert cell.flops == total_flops(cell.config)
        assert cell.config.run.seed == cell.seed
    for cell in progressive:
        mine = [c for c in grid.cells if c.control_of == cell.name]
        assert [c.config.model.num_layers for c in mine if c.arm == "short_control"] == [8]
        depths = [cell.config.model.num_layers, *(e.to_layers for e in cell.config.expansion)]
        never = [c for c in mine if c.arm == "never_grown"]
        assert [c.config.model.num_layers for c in never] == depths[:-1]
    assert "a-never_grown_of_gradual_stack_4-s1" in by_name
    assert "a-never_grown_of_zero_layer-tau0.4-random_0-s2" in by_name
    depths = [e.to_layers for e in by_name["a-gradual_stack-s1"].config.expansion]
    assert (by_name["a-gradual_stack-s1"].config.model.num_layers, depths) == (2, [4, 8])
    assert by_name["a-g_stack-s2"].config.model.num_layers == 2


def test_a_key_that_a_later_version_adds_undoes_no_finished_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> list[str]:
        return [cell.fingerprint for cell in load_grid(grid_file(tmp_path)).cells]

    before = found()
    for value in (None, 1):
        later = lambda config, value=value: decisive(config) | {"model.new": value}  # noqa: E731
        monkeypatch.setattr(fingerprints, "decisive", later)
        assert (found() == before) is (value is None)


def test_fingerprint_is_of_what_decides_the_result(tmp_path: Path) -> None:
    def prints(**changes: Any) -> set[str]:
        return {cell.fingerprint for cell in load_grid(grid_file(tmp_path, **changes)).cells}

    plain = prints()
    values = yaml.safe_load((tmp_path / "grid.yaml").read_text())["run"]
    same = {**values, "train": {**values["train"], "save_every": 7, "micro_batch": 2}}
    assert prints(run=same, study={"name": "other", "dir": str(tmp_path)}) == plain
    for section, key, value in (("train", "steps", 44), ("model", "hidden_size", 64),
                                ("data", "sequence_length", 16)):  # fmt: skip
        other = {**values, section: {**values[section], key: value}}
        assert not prints(run=other) & plain
    assert prints(seeds=[1, 2]) > plain


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": ["fixed", "tall"]}, "arms: got 'tall'; accepted: fixed, zero_layer"),
        ({"sizes": []}, "sizes: got none"),
        ({"sizes": [{"name": "a"}]}, "name and to_layers"),
        ({"speed": 1}, "speed: unknown key; accepted: study, run, sizes"),
        ({"tau": 0.5}, "tau: got 0.5; accepted: a list"),
        ({"tau": [1.5]}, "cell a-zero_layer-tau1.5-random-s1: expansion[0].at: got 1.5"),
        ({"run": {"expansion": []}}, "run.expansion: got one"),
        (
            {"run": {"model": {"family": "gpt2"}, "run": {"extend": True}}},
            "run.extend: got true in a grid",
        ),
    ],
)
def test_bad_grids(tmp_path: Path, capsys: Any, changes: dict[str, Any], words: str) -> None:
    path = grid_file(tmp_path, **changes)
    assert cli.main(["grid", "run", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "studies").exists()


def test_interrupted_at_random_each_cell_ends_once(
    jobs: Jobs, tmp_path: Path, corpus: Path
) -> None:
    """Stopped or killed ten times at random steps, cells go on from their saves and each runs to
    its end exactly once; one whose folder is deleted runs again, and no other."""
    path = grid_file(tmp_path, corpus)
    rng, study = random.Random(4), Study(load_grid(path))
    cells = study.grid.cells
    stamps: dict[str, int] = {}

    def run(steps: int | None = None, number: int = 0) -> int:
        """``mprog grid run``, with a signal after so many steps; returns its exit code."""
        until_idle(study)
        prepare = ("tests.grid.forked", "prepare", (str(path), steps, number))
        (code,) = jobs.run(1, tmp_path, ["grid", "run", str(path)], prepare).codes
        until_idle(study)
        for cell in cells:  # a finished cell is never written again
            if study.finished(cell):
                stamp = (cell.folder / "summary.json").stat().st_mtime_ns
                assert stamps.setdefault(cell.name, stamp) == stamp
        return code

    # 230 steps in all
    for _ in range(10):
        number = rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
        code = run(rng.randrange(20), number)
        assert code == (-number if number == signal.SIGKILL else 75)
    assert run() == 0
    assert [one.state for one in study.status()] == ["finished"] * 6
    assert [ends(study, cell) for cell in cells] == [1] * 6
    for cell in cells:
        steps = [e["step"] for e in read_metrics(cell.folder) if e["event"] == "train"]
        assert steps == list(range(1, cell.config.train.steps + 1))
    gone = cells[2]
    first = json.loads((gone.folder / "summary.json").read_text())
    shutil.rmtree(gone.folder)
    del stamps[gone.name]
    assert run() == 0
    assert [ends(study, cell) for cell in cells] == [1 + (cell is gone) for cell in cells]
    rows = {row["cell"]: row for row in study.collect()}
    assert rows.keys() == {cell.name for cell in cells}
    assert rows[gone.name]["final_eval_loss"] == first["final_eval_loss"]
    assert all(study.attempts(cell).failures == 0 for cell in cells)


def until_idle(study: Study) -> None:
    """Runs of a killed grid go on by themselves."""
    deadline = time.monotonic() + 600
    while any(one.state == "running" for one in study.status()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ends(study: Study, cell: Cell) -> int:
    """How often a cell ran to its end, or was started after it, by its log."""
    log = study.file("logs", cell, ".log").read_text()
    return log.count(": done in ") + log.count("finished before")


def test_words_replace_values_of_the_grid_and_of_its_runs(tmp_path: Path) -> None:
    path = grid_file(tmp_path, sizes=[{"name": "a", "to_layers": 2, "train.steps": 60}])
    plain = load_grid(path)
    words = ["train.steps=80", "study.dir=elsewhere", "seeds=[3]", "tau=[0.25]"]
    changed = load_grid(path, words)
    assert changed.folder == Path("elsewhere/small")
    steps = {c.arm: c.config.train.steps for c in changed.cells}
    assert (steps["fixed"], steps["zero_layer"]) == (80, 80)
    assert {cell.seed for cell in changed.cells} == {3}
    assert "a-zero_layer-tau0.25-random-s3" in {cell.name for cell in changed.cells}
    # the words are part of what the cells are
    assert not {c.fingerprint for c in plain.cells} & {c.fingerprint for c in changed.cells}
    assert load_grid(path, ["seeds=[1]"]).cells == plain.cells
    assert changed.reloaded().cells == changed.cells


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.stepz=4", "train.stepz: unknown key; did you mean train.steps?"),
        ("study.speed=4", "study.speed: unknown key; accepted: name, dir, retries"),
        ("run.seed=4", "run.seed: got 4; accepted: study.name, study.dir, seeds"),
        ("expansion.order=stack", "expansion.order: got 'stack'; accepted: a list"),
        ("expansion.order=[middle]", "expansion.order: got 'middle'; accepted: stack, inter, last"),
        ("expansion.at=[0.5]", "expansion.at: unknown key; accepted: order, insert"),
        ("quick", "quick: not understood; accepted: key=value words"),
    ],
)
def test_bad_words(tmp_path: Path, capsys: Any, word: str, said: str) -> None:
    path = grid_file(tmp_path, arms=["2_layers"], sizes=[{"name": "a", "to_layers": 4}])
    assert cli.main(["grid", "run", str(path), "--workers", "1", word]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "studies").exists()


def test_axes_of_the_expansion(tmp_path: Path) -> None:
    """Every combination that makes a difference, each once and under a name that says it."""
    grid = load_grid(
        grid_file(
            tmp_path, sizes=[{"name": "a", "to_layers": 8}], init=["random", "copying"],
            arms=["zero_layer", "one_layer", "4_layers", "multi_stage"],
            expansion={"order": ["stack", "inter"], "optimizer_state": ["inherit", "copy"]},
        )
    )  # fmt: skip
    names = {cell.name.removeprefix("a-").removesuffix("-s1") for cell in grid.cells}
    assert names == {
        "zero_layer-tau0.5-random-inherit",
        "one_layer-tau0.5-random-inherit",
        "one_layer-tau0.5-copying-inherit",
        "one_layer-tau0.5-copying-copy",
        *(
            f"{arm}-tau0.5-{how}"
            for arm in ("4_layers", "multi_stage")
            for how in ("random-inherit", "copying-stack-inherit", "copying-stack-copy",
                        "copying-inter-inherit", "copying-inter-copy")
        ),
    }  # fmt: skip
    assert len({cell.fingerprint for cell in grid.cells}) == len(grid.cells)
    by_name = {cell.name: cell.config for cell in grid.cells}
    multi = by_name["a-multi_stage-tau0.5-copying-inter-copy-s1"]
    assert multi.model.num_layers == 0
    assert [(e.at, e.to_layers, e.init) for e in multi.expansion] == [
        (0.25, 2, "random"), (0.5, 8, "copying"),
    ]  # fmt: skip
    assert (multi.expansion[1].order, multi.expansion[1].optimizer_state) == ("inter", "copy")
    assert by_name["a-4_layers-tau0.5-random-inherit-s1"].model.num_layers == 4


def test_a_layout_for_the_full_depth(tmp_path: Path) -> None:
    """Controls have it from the first step; it decides nothing of the result."""
    size = {"name": "a", "to_layers": 4, "model.num_attention_heads": 2, "train.micro_batch": 2}
    arms = ["fixed", "zero_layer", "short_control", "multi_stage"]
    plain = load_grid(grid_file(tmp_path, sizes=[size], arms=arms))
    changed = load_grid(
        grid_file(tmp_path, sizes=[{**size, "expansion.parallel.tensor": 2}], arms=arms)
    )
    for cell in changed.cells:
        last = len(cell.config.expansion)
        assert cell.config.parallel_after(last).tensor == 2
        if last:
            assert cell.config.parallel_after(last - 1).tensor == 1
    assert [c.fingerprint for c in changed.cells] == [c.fingerprint for c in plain.cells]
