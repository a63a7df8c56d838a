"""What a failed try counts for, what ends a grid early, and what it says then."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive.config import ConfigError
from megatron_progressive.grid import run as grid_run
from megatron_progressive.grid import run_cell as grid_cell
from megatron_progressive.grid.cells import Cell
from megatron_progressive.grid.failures import judge
from megatron_progressive.grid.grid import load_grid
from megatron_progressive.grid.launch import Launch
from megatron_progressive.grid.run import run_grid
from megatron_progressive.grid.state import RUNNING, WAITING, Study
from megatron_progressive.runtime import folder_lock
from megatron_progressive.runtime.folder_lock import LOCK_NAME, FolderLock
from tests.grid.test_grid import grid_file
from tests.grid.test_state import counting, one_cell, tries
from tests.runs.synthetic import write_run, write_study


@pytest.mark.parametrize(
    ("code", "text", "begun", "own"),
    [
        # its own: the run began, a rank says what went wrong in it, its configuration or data
        (1, "", True, True),
        (-9, "step 7", True, True),
        (1, "rank 3: OutOfMemoryError: 80 GiB\nsrun: error: task 3: Exited with exit code 1", False,
         True),
        (2, "mprog: data.corpus: got x; accepted: y", False, True),
        (2, "0: mprog: run.name: cells/a holds a run with train.steps=3", False, True),
        (2, "mprog: expansion[0].at: got 2.5", False, True),
        # the place's: what starts runs, its variables, ranks and devices, a folder of no use
        (2, "python: can't open file 'x'", False, False),
        (2, "usage: srun", False, False),
        (2, "", False, False),
        (1, "srun: error: Unable to create step: Socket timed out", False, False),
        (1, "python3: No module named megatron_progressive", False, False),
        (127, "bash: srun: command not found", False, False),
        (-15, "", False, False),
        (2, "mprog: environment: got SLURM_PROCID=None; accepted: all three", False, False),
        (2, "mprog: SLURM_NTASKS: got x", False, False),
        (2, "mprog: --nproc: got 2 in a job of 4 ranks", False, False),
        (2, "mprog: parallel: tensor 4 x pipeline 1 = 4 does not divide the 2 ranks", False, False),
        (2, "mprog: expansion[0].parallel.tensor: got 4", False, False),
        (2, "mprog: train.global_batch: got 4; accepted: a multiple of 8", False, False),
        (2, "mprog: run.dir: cells cannot be written: Read-only file system", False, False),
        (1, "rank 1: DistNetworkError: the client socket has timed out", False, False),
    ],
)  # fmt: skip
def test_whose_failure_it_was(code: int, text: str, begun: bool, own: bool) -> None:
    found = judge(code, text, begun)
    assert found.own is own
    assert found.line


def test_a_run_that_another_job_has_is_nobodys_failure() -> None:
    found = judge(2, "mprog: run.name: cells/a is in use by another job, process 3", False)
    assert (found.own, found.in_use) == (False, True)


@pytest.mark.parametrize(
    ("then", "starts"),
    [
        ("sys.exit('srun: error: Socket timed out')", 6),  # perhaps for a moment: two cells, thrice
        ("print('bash: line 1: x: command not found'); sys.exit(127)", 1),  # for every cell
        ("print('mprog: environment: got RANK=x'); sys.exit(2)", 1),
        ("print('usage: srun'); sys.exit(2)", 1),
        ("print('mprog: parallel: tensor 2 does not divide the 1 rank'); sys.exit(2)", 2),
        ("sys.exit('No module named megatron_progressive')", 1),
    ],
)
def test_a_bad_place_exhausts_no_cell(
    tmp_path: Path, corpus: Path, capsys: Any, then: str, starts: int
) -> None:
    study = Study(load_grid(grid_file(tmp_path, corpus, arms=["fixed"])))
    launch, said = counting(tmp_path, then), []  # type: ignore[var-annotated]
    if starts == 1:
        with pytest.raises(ConfigError, match="no cell can be started here: "):
            run_grid(study, 1, launch, said.append)
    else:
        assert run_grid(study, 1, launch, said.append) == 1
        assert said[-1] == "small: 2 of 2 cells not finished (2 not run here)"
    assert tries(tmp_path) == starts
    for cell in study.grid.cells:
        found = study.status_of(cell)
        assert (found.state, found.attempts.failures) == (WAITING, 0)
    assert study.status()[0].why  # which status shows
    # elsewhere they run
    for cell in study.grid.cells:
        write_run(cell.config, 3.0)
    assert run_grid(study, 1, launch, said.append) == 0
    assert said[-1] == "small: nothing to do, all 2 cells are finished"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--srun", "no-such-program --x"],
            "--srun: got 'no-such-program --x', no program no-such",
        ),
        (["--srun", "srun 'x"], '--srun: got "srun \'x": No closing quotation'),
        (["--workers", "0"], "--workers: got '0'; accepted: an integer from 1"),
        (["--nproc", "0"], "--nproc: got '0'; accepted: an integer from 1"),
        (["--cell", "a-fixed-s9"], "--cell: got 'a-fixed-s9', which "),
    ],
)
def test_what_cannot_start_anything_is_said_before(
    tmp_path: Path, capsys: Any, words: list[str], said: str
) -> None:
    path = grid_file(tmp_path)
    assert cli.main(["grid", "run", str(path), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "studies").exists()


def test_a_second_grid_says_who_runs_its_cell(tmp_path: Path, corpus: Path) -> None:
    study = one_cell(tmp_path, corpus)
    (cell,) = study.grid.cells
    said: list[str] = []
    with study.lock(cell):
        assert run_grid(study, 1, Launch(srun="false"), said.append) == 1
        owner = f"process {os.getpid()} on "
        assert any(line.startswith(f"{cell.name}: another worker has it: {owner}") for line in said)
    assert said[-1] == "small: 1 of 1 cells not finished (1 run by other workers)"


def test_cells_of_a_host_that_failed_are_taken_over(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a node failed: the lock it left looks taken for a while."""
    monkeypatch.setattr(grid_run, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.05)
    study = one_cell(tmp_path, corpus)
    (cell,) = study.grid.cells
    lock = study.file("locks", cell)
    lock.mkdir(parents=True)
    left = lock / "token"
    left.write_text('{"host": "elsewhere", "pid": 7, "since": 1.0, "started": "8", "machine": "m"}')
    assert study.status_of(cell).state == RUNNING
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "waiting" in line:  # two minutes pass
            os.utime(left, (time.time() - 500,) * 2)

    launch = counting(tmp_path, "sys.exit('rank 0: X: no')")
    assert run_grid(study, 1, launch, say) == 1
    assert any("another worker has it: process 7 on elsewhere" in line for line in said)
    assert tries(tmp_path) == 3
    assert said[-1] == "small: 1 of 1 cells not finished (1 failed)"


def test_the_lock_lasts_as_long_as_the_run(tmp_path: Path, corpus: Path) -> None:
    """A worker that is killed leaves a run that goes on: nobody starts another beside it."""
    study = one_cell(tmp_path, corpus)
    (cell,) = study.grid.cells
    going = tmp_path / "going"
    code = (
        "import sys; from pathlib import Path; "
        "from megatron_progressive.grid.grid import load_grid; "
        "from megatron_progressive.grid.run_cell import run_cell; "
        "from megatron_progressive.grid.launch import Launch; "
        "from megatron_progressive.grid.state import Study; "
        f"study = Study(load_grid(Path({str(study.grid.file)!r}))); "
        "run_cell(study, study.grid.cells[0], Launch(srun=sys.argv[1]))"
    )  # fmt: skip
    script = tmp_path / "run.sh"
    script.write_text(
        f"#!/bin/sh\ntrap '' USR1\necho $$ > {going}.tmp; mv {going}.tmp {going}\nexec sleep 600\n"
    )
    script.chmod(0o755)
    worker = subprocess.Popen([sys.executable, "-c", code, str(script)])
    deadline = time.monotonic() + 120
    while not going.exists() or len(list(study.file("locks", cell).iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker.kill()
    worker.wait()
    run = int(going.read_text())
    try:
        assert study.status_of(cell).state == RUNNING
        assert grid_cell.run_cell(study, cell, Launch(srun="false")) is None
        assert (owner := study.owner(cell)) is not None
        assert owner.pid == run
    finally:
        os.kill(run, 9)
    while study.status_of(cell).state == RUNNING:  # until it is reaped
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with study.lock(cell) as lock:
        assert lock is not None
    assert not study.file("locks", cell).exists()


def test_a_run_without_a_worker_has_its_cell(tmp_path: Path, corpus: Path) -> None:
    study = one_cell(tmp_path, corpus)
    (cell,) = study.grid.cells
    with FolderLock(cell.folder / LOCK_NAME):  # as mprog train has it
        assert study.status_of(cell).state == RUNNING
        launch = counting(tmp_path, "")
        assert grid_cell.run_cell(study, cell, launch) is None
        assert not (tmp_path / "tries").exists()


def _look(study: Study, cell: Cell, until: Path, looked: Path) -> None:
    """Look at a cell until a file is there; say how often in another one."""
    count = 0
    while not until.exists():
        study.owner(cell)
        count += 1
    looked.write_text(str(count))


def test_nobody_is_turned_away_by_those_who_look(tmp_path: Path, corpus: Path) -> None:
    study = one_cell(tmp_path, corpus)
    (cell,) = study.grid.cells
    context, stop = multiprocessing.get_context("fork"), tmp_path / "stop"
    counts = [tmp_path / f"looked{number}" for number in range(2)]
    others = [context.Process(target=_look, args=(study, cell, stop, file)) for file in counts]
    for other in others:
        other.start()
    try:
        for _ in range(200):
            with study.lock(cell) as lock:
                assert lock is not None
    finally:
        stop.touch()
        for other in others:
            other.join()
    assert sum(int(file.read_text()) for file in counts) > 200


def test_who_looks_at_a_cell_writes_nothing(tmp_path: Path, corpus: Path) -> None:
    study = one_cell(tmp_path, corpus)
    (cell,) = study.grid.cells

    def files() -> set[Path]:
        return set((tmp_path / "studies").rglob("*"))

    study.status()
    assert files() == set()
    with study.lock(cell):
        before = files()
        assert study.status_of(cell).state == RUNNING
        assert files() == before


def test_an_edited_grid_does_not_move_cells_that_were_asked_for(
    tmp_path: Path, corpus: Path, capsys: Any
) -> None:
    path = grid_file(tmp_path, corpus)
    study = Study(load_grid(path))
    name = study.grid.cells[3].name
    grid_file(tmp_path, corpus, arms=["zero_layer", "short_control", "fixed"], tau=[0.25, 0.5])
    edited = load_grid(path)
    (cell,) = edited.chosen([name])
    assert cell.name == name
    assert edited.cells[3].name != name
    grid_file(tmp_path, corpus, sizes=[{"name": "c", "to_layers": 2}])
    assert cli.main(["grid", "run", str(path), "--cell", name]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"mprog: --cell: got {name!r}, which {path} does not have; accepted: ")
    assert len(error.splitlines()) == 1


def test_a_finished_study_says_that_there_is_nothing_to_do(tmp_path: Path, capsys: Any) -> None:
    path = grid_file(tmp_path)
    write_study(load_grid(path))
    assert cli.main(["grid", "run", str(path)]) == 0
    assert capsys.readouterr().out == "small: nothing to do, all 6 cells are finished\n"
    assert cli.main(["grid", "run", str(path), "--cell", "a-fixed-s1"]) == 0
    assert capsys.readouterr().out == "small: nothing to do, a-fixed-s1 is finished\n"


def test_a_run_without_a_result_is_a_failure(tmp_path: Path, corpus: Path) -> None:
    """It ends well, and its run is not finished: again and again would help nobody."""
    study = one_cell(tmp_path, corpus)
    (cell,) = study.grid.cells
    made = tmp_path / "made"
    write_run(replace(cell.config, run=replace(cell.config.run, dir=str(made))), 3.0)
    run = made / cell.run_name
    (run / "summary.json").unlink()
    then = (f"import shutil\nshutil.rmtree({str(cell.folder)!r}, ignore_errors=True)\n"
            f"shutil.copytree({str(run)!r}, {str(cell.folder)!r})")  # fmt: skip
    said: list[str] = []
    assert run_grid(study, 1, counting(tmp_path, then), said.append) == 1
    assert study.attempts(cell).failures == 3
    assert said[-2] == f"{cell.name}: ended without a final validation loss that is a number"
