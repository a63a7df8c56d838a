"""Evaluations beside a run: one at a time, of the newest checkpoint, never a harm to the run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive import config as configuration
from megatron_progressive.checkpoints.checkpoint import checkpoint_path
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.evaluation import background, names
from megatron_progressive.evaluation.background import Evaluations, check_eval_tasks
from megatron_progressive.evaluation.results import results_folder
from megatron_progressive.runs.decisive import decisive
from megatron_progressive.runtime.tied import start_tied
from tests.train.small_runs import run_values

TRAIN = {"steps": 16, "global_batch": 4, "micro_batch": 4, "save_every": 4, "eval_tasks_every": 4,
         "eval_tasks": ["/no/such.yaml"]}  # fmt: skip


def config_of(folder: Path, **changes: Any) -> RunConfig:
    train = {**TRAIN, **changes}
    return configuration.from_dict(run_values(folder, folder, "run", train=train, expansion=[]))


def evaluations_of(folder: Path, active: bool = True) -> tuple[Evaluations, list[str]]:
    found, said = Evaluations(config_of(folder), active), list[str]()
    found.say = lambda step, line: said.append(line)
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "config.yaml").touch()
    return found, said


def test_a_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install -e '.[eval]')")
    monkeypatch.setenv("RANK", "0")  # as a rank has it: the evaluation is none
    found, said = evaluations_of(tmp_path)
    found.saved(4)
    assert found.steps == [4]
    deadline = time.monotonic() + 300
    while found.steps and time.monotonic() < deadline:
        found.poll()
        time.sleep(0.05)
    log = tmp_path / "run" / "evaluations" / "step_0000004.log"
    assert len(said) == 1, said
    assert "the evaluation of step 4 failed" in said[0]
    assert "no file /no/such.yaml" in said[0]
    assert f"({log})" in said[0]
    assert "no file /no/such.yaml" in log.read_text()


def test_one_at_a_time_and_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Any, dict[str, str], list[str]]] = []

    def slow(words: list[str], environment: dict[str, str], **options: Any) -> Any:
        process = start_tied(["sleep", "600"], environment, **options)
        started.append((process, environment, words))
        return process

    monkeypatch.setattr(background, "start_tied", slow)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    found, said = evaluations_of(tmp_path)
    found.saved(3)  # no multiple of train.eval_tasks_every
    assert (found.steps, said) == ([], [])
    for step in (4, 8, 12):
        found.saved(step)
    assert found.steps == [4, 12]
    assert [line.partition(":")[0] for line in said] == ["step 8 is not evaluated"]
    (one,) = started
    process, environment, words = one
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID"} & {*environment}
    assert str(checkpoint_path(tmp_path / "run", 4)) in words
    process.kill()
    process.wait()
    found.poll()
    assert found.steps == [12]
    assert "the evaluation of step 4 failed: exit code -9" in said[1]
    found.close()
    assert started[1][0].poll() is not None
    assert found.steps == []
    idle, _ = evaluations_of(tmp_path, active=False)  # as on other ranks
    idle.saved(4)
    assert idle.steps == []


def test_what_an_earlier_job_left_is_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = evaluations_of(tmp_path)
    monkeypatch.setattr(found, "_start", lambda step: None)
    for step, evaluated in ((4, "own"), (8, "of other weights"), (12, None)):
        path = checkpoint_path(tmp_path / "run", step)
        path.mkdir(parents=True)
        (path / "progress.json").write_text(json.dumps({"checksum": "own"}))
        if evaluated is not None:
            results_folder(path).mkdir(parents=True)
            result = {"task": "such", "metrics": {}, "checkpoint": {"checksum": evaluated},
                      "limit": None}  # fmt: skip
            (results_folder(path) / "such.json").write_text(json.dumps(result))
    started: list[int] = []
    monkeypatch.setattr(found, "_start", started.append)
    found.catch_up()
    assert [*started, *found.steps] == [8, 12]


def test_tasks_decide_nothing_of_a_run(tmp_path: Path) -> None:
    without = config_of(tmp_path, eval_tasks=[], eval_tasks_every=0)
    assert decisive(config_of(tmp_path)) == decisive(without)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "is_installed", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.eval_tasks: got /no/such\.yaml, and lm_eval"):
        check_eval_tasks(config_of(tmp_path))
    check_eval_tasks(config_of(tmp_path), looks_up=False)
    images = {"run": {"name": "run", "dir": str(tmp_path)}, "model": {"family": "resnet"},
              "train": {"eval_tasks": ["sciq"]}}  # fmt: skip
    with pytest.raises(ConfigError, match="for a model of family resnet"):
        check_eval_tasks(configuration.from_dict(images))
    assert cli.main(["eval", str(tmp_path), "--tasks", ","]) == 2
