"""A study as jobs of Slurm, against commands that write down what they get (tests/launch has a
real Slurm)."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive.grid.grid import load_grid
from megatron_progressive.grid.state import Attempts, Study
from megatron_progressive.grid.submit import JobOptions, plan_jobs
from tests.grid.test_grid import grid_file

# Numbers jobs from 41; those from REFUSE_FROM on are refused.
SBATCH = """#!/bin/bash
printf '%q ' "$@" >> {log}; echo >> {log}
number=$((40 + $(wc -l < {log})))
if [ $number -ge {refuse_from} ]; then echo "Invalid partition" >&2; exit 1; fi
echo "$number"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``slurm(refuse_from=…, queued=…)`` puts sbatch, squeue and scancel into PATH."""
    log = tmp_path / "sbatch.log"
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def make(refuse_from: int = 99, queued: str = "") -> Path:
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, text in (
            ("sbatch", SBATCH.format(log=log, refuse_from=refuse_from)),
            ("squeue", f"#!/bin/sh\necho '{queued}'\n"),
            ("scancel", f'#!/bin/sh\necho scancel "$@" >> {log}\n'),
        ):
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        return log

    return make


def finish(study: Study, *indices: int) -> None:
    for index in indices:
        cell = study.grid.cells[index]
        cell.folder.mkdir(parents=True)
        summary = {"steps": cell.config.train.steps, "final_eval_loss": 1.0}
        (cell.folder / "summary.json").write_text(json.dumps(summary))


def test_jobs_of_what_is_not_finished(tmp_path: Path) -> None:
    path = grid_file(tmp_path)
    study = Study(load_grid(path, ["train.eval_every=10"]))
    assert len(study.grid.cells) == 6
    finish(study, 0, 3)
    study.remember(study.grid.cells[5], Attempts(failures=3, error="boom"))
    cells, report = plan_jobs(study, JobOptions(2, "--time=5 --qos='a b'", 4))
    assert cells.cells == [study.grid.cells[i].name for i in (1, 2, 4)]
    command = cells.command({})
    assert "--array=0-2%4" in command
    assert {"--nodes=2", "--time=5", "--qos=a b"} <= {*command}
    assert command[-4:] == ["cell", str(cells.cells_file), str(path), "train.eval_every=10"]
    assert not any(word.startswith("--dependency") for word in command)
    assert "--dependency=afterany:17" in report.command({"cells": "17"})
    assert {"--nodes=1", "--ntasks-per-node=1"} <= {*report.options}
    finish(study, 1, 2, 4)
    assert plan_jobs(study, JobOptions()) == []


def test_a_pilot_goes_first_until_it_is_measured(tmp_path: Path) -> None:
    study = Study(load_grid(grid_file(tmp_path, tau=["pilot"], pilot={"steps": 30})))
    pilot, cells, report = plan_jobs(study, JobOptions(3))
    numbers = {"pilot": "7", "cells": "8"}
    assert pilot.after is None
    assert "--nodes=3" in pilot.options
    assert "--dependency=afterok:7" in cells.command(numbers)
    assert "--dependency=afterany:8" in report.command(numbers)
    assert cells.cells == [cell.name for cell in study.grid.cells]  # without a τ yet, too


def test_submission_is_recorded(tmp_path: Path, slurm: Any, capsys: Any) -> None:
    log = slurm()
    path = grid_file(tmp_path, tau=["pilot"], pilot={"steps": 30})
    assert cli.main(["grid", "submit", str(path), "--sbatch=--time=5", "seeds=[2]"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "pilot: 41", "cells: 42 (6 cells)", "report: 43",
    ]  # fmt: skip
    lines = [shlex.split(line) for line in log.read_text().splitlines()]
    assert "--dependency=afterok:41" in lines[1]
    assert "--dependency=afterany:42" in lines[2]
    assert all("seeds=[2]" in line and "--time=5" in line for line in lines)
    study = Study(load_grid(path, ["seeds=[2]"]))
    (record,) = json.loads((study.folder / "jobs.json").read_text())["submitted"]
    assert record["jobs"] == {"pilot": "41", "cells": "42", "report": "43"}
    assert record["cells"]["0"] == study.grid.cells[0].name
    # not again while they are in the queue
    slurm(queued="42")
    assert cli.main(["grid", "submit", str(path)]) == 2
    assert "jobs 42 of this study are in the queue" in capsys.readouterr().err
    slurm(queued="77")
    assert cli.main(["grid", "submit", str(path)]) == 0
    assert len(json.loads((study.folder / "jobs.json").read_text())["submitted"]) == 2


def test_a_dry_run_is_a_script_that_submits_the_same(
    tmp_path: Path, slurm: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    path = grid_file(tmp_path, tau=["pilot"], pilot={"steps": 30})
    assert cli.main(["grid", "submit", str(path), "--dry-run", "--sbatch=--comment='a b'"]) == 0
    script = capsys.readouterr().out
    assert not (tmp_path / "studies").exists()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    log = slurm()
    subprocess.run(["bash", "-euc", script], check=True)
    dry = log.read_text()
    log.unlink()
    assert cli.main(["grid", "submit", str(path), "--sbatch=--comment='a b'"]) == 0
    assert dry == log.read_text()


def test_a_refused_job_takes_back_those_before_it(tmp_path: Path, slurm: Any, capsys: Any) -> None:
    log = slurm(refuse_from=43)
    path = grid_file(tmp_path, tau=["pilot"], pilot={"steps": 30})
    assert cli.main(["grid", "submit", str(path)]) == 1
    assert capsys.readouterr().err == "mprog: sbatch: report: Invalid partition\n"
    assert log.read_text().splitlines()[-1] == "scancel 41 42"
    assert not (tmp_path / "studies" / "small" / "jobs.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "sbatch: not found; accepted: a host of a Slurm cluster, or --dry-run"),
        (["--dry-run", "--nodes=0"], "--nodes: got '0'; accepted: an integer from 1"),
        (["--dry-run", "--array-limit=0"], "--array-limit: got '0'; accepted: an integer from 1"),
        (["--dry-run", "--sbatch=--comment='a"], '--sbatch: got "--comment=\'a": No closing'),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["grid", "submit", str(grid_file(tmp_path)), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "studies").exists()
