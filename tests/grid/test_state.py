"""What is said of a running grid, how long the rest takes, and cells that fail."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_progressive.grid.grid import load_grid
from megatron_progressive.grid.launch import Launch
from megatron_progressive.grid.run import run_grid
from megatron_progressive.grid.run_cell import run_cell
from megatron_progressive.grid.state import (
    FAILED,
    FINISHED,
    RUNNING,
    WAITING,
    Attempts,
    CellStatus,
    Study,
)
from megatron_progressive.grid.text import show_status, time_left
from tests.grid.test_grid import grid_file
from tests.runs.synthetic import write_run


def states(study: Study) -> list[CellStatus]:
    """Of six cells: two finished of size a, one running halfway of size b, the others not begun."""
    first, *_ = study.status()
    found = []
    for index, cell in enumerate(study.grid.cells):
        one = replace(first, cell=cell, state=WAITING, flops=0.0, flops_per_s=None)
        if index < 2:
            one = replace(one, state=FINISHED, flops=cell.flops, flops_per_s=100.0 * (1 + index),
                          loss=3.25)  # fmt: skip
        if index == 3:
            one = replace(one, state=RUNNING, flops=cell.flops / 2, flops_per_s=50.0)
        found.append(one)
    return found


def test_time_left_is_what_is_left_over_the_rate_of_the_size(tmp_path: Path) -> None:
    study = Study(load_grid(grid_file(tmp_path)))
    found = states(study)
    flops = [one.cell.flops for one in found]
    seconds = flops[2] / 150 + (flops[3] / 2 + flops[4] + flops[5]) / 50
    assert time_left(found) == (pytest.approx(seconds), 1)
    # two at a time; what has failed takes no more time
    found[4] = replace(found[4], state=RUNNING)
    found[2] = replace(found[2], state=FAILED)
    seconds = (flops[3] / 2 + flops[4] + flops[5]) / 50 / 2
    assert time_left(found) == (pytest.approx(seconds), 2)
    assert time_left(study.status()) is None


def test_status_is_live_on_a_terminal_and_plain_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(load_grid(grid_file(tmp_path)))
    running = states(study)
    ended = [replace(one, state=FINISHED, loss=3.125) for one in running]
    looks = [running, running, ended]
    seen = []

    def look() -> list[CellStatus]:
        seen.append(1)
        return looks[len(seen) - 1]

    console = Console(width=120, file=io.StringIO(), force_terminal=True)
    show_status(look, watch=True, seconds=0.01, console=console)
    assert len(seen) == 3  # until all have ended
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" in text
    assert "left, 1 at a time" in text
    assert "3.1250" in text
    plain = io.StringIO()
    show_status(lambda: running, watch=True, console=Console(file=plain))
    assert "\x1b" not in plain.getvalue()
    assert plain.getvalue().count("a-fixed-s1") == 1
    assert "2 finished, 3 waiting, 1 running" in plain.getvalue()


def one_cell(tmp_path: Path, corpus: Path) -> Study:
    """A study of one fixed-size cell, which is tried three times."""
    sizes = [{"name": "a", "to_layers": 2}]
    return Study(load_grid(grid_file(tmp_path, corpus, sizes=sizes, arms=["fixed"])))


def counting(tmp_path: Path, then: str) -> Launch:
    """Starts a script that notes that it was started, and then does ``then``."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nfile = open({str(tmp_path / 'tries')!r}, 'a')\n"
                      f"file.write('x')\nfile.close()\n{then}\n")  # fmt: skip
    return Launch(srun=f"{sys.executable} {script}")


def tries(tmp_path: Path) -> int:
    return len((tmp_path / "tries").read_text())


def test_a_failing_cell_is_tried_again_so_often_and_says_why(tmp_path: Path, corpus: Path) -> None:
    study = one_cell(tmp_path, corpus)
    (cell,) = study.grid.cells
    launch = counting(tmp_path, "print('before'); sys.exit('rank 0: OSError: no disk')")
    said: list[str] = []
    assert run_grid(study, 1, launch, said.append) == 1
    assert tries(tmp_path) == 3
    assert study.attempts(cell).failures == 3
    assert said[-2] == f"{cell.name}: rank 0: OSError: no disk"
    assert said[-1] == "small: 1 of 1 cells not finished (1 failed)"
    found = study.status_of(cell)
    assert (found.state, found.why) == (FAILED, "rank 0: OSError: no disk")
    # so often in all, not each time
    assert run_grid(study, 1, launch, said.append) == 1
    assert tries(tmp_path) == 3
    assert "not run: failed 3 times: rank 0: OSError: no disk (delete " in said[-2]
    study.file("attempts", cell, ".json").unlink()
    assert run_grid(study, 1, launch, said.append) == 1
    assert tries(tmp_path) == 6


def test_a_bad_configuration_and_a_stopped_run_are_not_tried_again(
    tmp_path: Path, corpus: Path
) -> None:
    study = one_cell(tmp_path, corpus)
    (cell,) = study.grid.cells
    assert run_cell(study, cell, counting(tmp_path, "sys.exit(75)")) == 75
    assert (tries(tmp_path), study.attempts(cell).failures) == (1, 0)
    assert (
        run_cell(study, cell, counting(tmp_path, "print('mprog: data.corpus: bad'); sys.exit(2)"))
        == 2
    )
    assert tries(tmp_path) == 2
    assert study.status_of(cell).state == FAILED
    assert run_cell(study, cell, counting(tmp_path, "")) is None


def test_a_run_that_ends_well_after_a_failure_is_finished(tmp_path: Path, corpus: Path) -> None:
    study = one_cell(tmp_path, corpus)
    (cell,) = study.grid.cells
    made = tmp_path / "made"
    write_run(replace(cell.config, run=replace(cell.config.run, dir=str(made))), 3.0)
    counted, ready = str(tmp_path / "tries"), str(made / cell.config.run.name)
    then = (
        f"import os, shutil\nif os.path.getsize({counted!r}) < 2: sys.exit('rank 0: X: no')\n"
        f"shutil.copytree({ready!r}, {str(cell.folder)!r})"
    )
    assert run_grid(study, 1, counting(tmp_path, then), print) == 0
    found = study.status_of(cell)
    assert (found.state, found.loss, found.attempts.failures) == (FINISHED, 3.0, 1)
    assert found.attempts == Attempts(1, "", found.attempts.version)


def test_a_corpus_that_is_gone_is_the_reason(tmp_path: Path, corpus: Path) -> None:
    """A real failure of ``mprog train``: a file of the corpus disappears after the grid's check."""
    prepared = tmp_path / "prepared"
    shutil.copytree(corpus, prepared)
    study = one_cell(tmp_path, prepared)
    (cell,) = study.grid.cells
    (prepared / "train.bin").unlink()
    assert run_cell(study, cell, Launch()) not in (0, None)
    found = study.status_of(cell)
    assert found.state == FAILED
    assert "train.bin" in found.why


def test_a_cell_that_runs_is_locked(tmp_path: Path, corpus: Path) -> None:
    study = one_cell(tmp_path, corpus)
    (cell,) = study.grid.cells
    with study.lock(cell) as lock:
        assert lock is not None
        assert study.status_of(cell).state == RUNNING
        code = (f"from pathlib import Path; from megatron_progressive.grid.grid import load_grid; "
                f"from megatron_progressive.grid.run_cell import run_cell; "
                f"from megatron_progressive.grid.launch import Launch; "
                f"from megatron_progressive.grid.state import Study; "
                f"s = Study(load_grid(Path({str(study.grid.file)!r}))); "
                f"print(run_cell(s, s.grid.cells[0], Launch(srun='false')))")  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              check=True)  # fmt: skip
        assert done.stdout.strip() == "None"
    assert study.status_of(cell).state == WAITING
