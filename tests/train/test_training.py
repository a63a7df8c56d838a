"""Whole runs on real text: same curve on every layout, saving, resuming, being killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive.checkpoints.checkpoint import checkpoints, read_whole
from megatron_progressive.config import load, to_yaml
from megatron_progressive.cost.flops import total_flops
from megatron_progressive.runs.folder import read_metrics
from tests.pool import Pool
from tests.train.small_runs import run_config, train_here

ROOT = Path(__file__).resolve().parents[2]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step; each step must be there once."""
    events = [e for e in read_metrics(folder) if e["event"] == "train"]
    assert len({e["step"] for e in events}) == len(events), "a step twice in the metrics"
    return {e["step"]: e["loss"] for e in events}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_metrics(folder) if e["event"] == kind]


def largest_difference(a: dict[int, float], b: dict[int, float]) -> float:
    assert a.keys() == b.keys()
    return max(abs(a[step] - b[step]) / a[step] for step in a)


@pytest.mark.parametrize("optimizer", ["adamw", "muon_nsgd"])
def test_same_curve_on_every_layout(
    pool: Pool, corpus: Path, tmp_path: Path, optimizer: str
) -> None:
    layouts = {
        "one": (1, "train.micro_batch=8"),
        "dp2": (2, "train.micro_batch=4"),
        "tp2": (2, "parallel.tensor=2"),
        "pp2": (2, "parallel.pipeline=2"),
        "dp2_tp2": (4, "parallel.tensor=2"),
        "dp2_pp2": (4, "parallel.pipeline=2", "train.micro_batch=2"),  # 2 micro-batches a rank
        "dp4_to_tp2_pp2": (
            4,
            "train.micro_batch=2",
            "expansion.0.parallel.tensor=2",
            "expansion.0.parallel.pipeline=2",
        ),
    }
    curves = {}
    for name, (world, *words) in layouts.items():
        config = run_config(tmp_path, corpus, name, f"optim.name={optimizer}", "train.save_every=0",
                            *words)  # fmt: skip
        assert set(pool.run(world, train_here, config)) == {0}
        curves[name] = losses(config.folder)
    assert len(curves["one"]) == 60
    assert curves["one"][40] < 0.95 * curves["one"][1]
    differences = {name: largest_difference(curves["one"], curve) for name, curve in curves.items()}
    print(optimizer, differences)
    assert max(differences.values()) < 2e-4, differences


def test_same_layout_is_bitwise_the_same_run(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        config = run_config(tmp_path, corpus, name, "expansion.0.parallel.tensor=2",
                            "train.micro_batch=2")  # fmt: skip
        pool.run(2, train_here, config)
    keys = ("event", "step", "loss", "grad_norm", "lr", "flops", "tokens", "loss_before",
            "loss_after")  # fmt: skip
    first, second = (
        [{k: e[k] for k in keys if k in e} for e in read_metrics(tmp_path / name)]
        for name in ("first", "second")
    )
    assert first == second
    assert sum(e["event"] == "train" for e in first) == 60


def test_a_run_that_stops_early_goes_on_to_the_same_bits(
    pool: Pool, corpus: Path, tmp_path: Path
) -> None:
    """Stopped inside the decay: with a schedule of its own it would have another."""
    whole = run_config(tmp_path, corpus, "whole", "train.save_every=0")
    pool.run(1, train_here, whole)
    part = run_config(tmp_path, corpus, "part", "train.save_every=0", "train.stop_after=57")
    pool.run(1, train_here, part)
    summary = json.loads((part.folder / "summary.json").read_text())
    assert summary["steps"] == 57
    assert summary["final_eval_loss"] == events(part.folder, "eval")[-1]["loss"]
    assert events(part.folder, "eval")[-1]["step"] == 57
    assert summary["total_flops"] == total_flops(part)
    first = {step: loss for step, loss in losses(whole.folder).items() if step <= 57}
    assert losses(part.folder) == first
    pool.run(1, train_here, run_config(tmp_path, corpus, "part", "train.save_every=0"))
    assert losses(part.folder) == losses(whole.folder)
    ends = [json.loads((run.folder / "summary.json").read_text()) for run in (part, whole)]
    assert ends[0]["steps"] == 60
    assert ends[0]["final_eval_loss"] == ends[1]["final_eval_loss"]


@pytest.mark.parametrize(("saved_at", "virtual"), [(20, 1), (40, 2), (50, 1)])
def test_resume_on_another_layout(
    pool: Pool, corpus: Path, tmp_path: Path, saved_at: int, virtual: int
) -> None:
    """Saved on DP=4 before τ = 40, right before expanding or after it; resumed on TP=2 x PP=2
    (x VPP=2)."""
    words = ["train.micro_batch=2", "train.save_every=10", "expansion.0.parallel.tensor=2",
             "expansion.0.parallel.pipeline=2"]  # fmt: skip
    whole = run_config(tmp_path, corpus, "whole", *words, "train.keep_checkpoints=0")
    pool.run(4, train_here, whole)
    part = run_config(tmp_path, corpus, "part", *words)
    part.folder.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        text = (whole.folder / name).read_text().replace("name: whole", "name: part")
        (part.folder / name).write_text(text)
    saved = f"step_{saved_at:07d}"
    shutil.copytree(whole.folder / "checkpoints" / saved, part.folder / "checkpoints" / saved)
    resumed = run_config(tmp_path, corpus, "part", "parallel.tensor=2", "parallel.pipeline=2",
                         f"parallel.virtual_pipeline={virtual}")  # fmt: skip
    pool.run(4, train_here, resumed)
    assert largest_difference(losses(whole.folder), losses(part.folder)) < 2e-4
    (resume,) = events(part.folder, "resume")
    assert resume["layout"] == "DP=1 x TP=2 x PP=2" + " x VPP=2" * (virtual > 1)
    assert resume["step"] == saved_at
    assert len(events(part.folder, "expansion")) == 1
    assert [e["step"] for e in events(part.folder, "eval")] == [0, 20, 40, 60]
    assert json.loads((part.folder / "summary.json").read_text())["resumed"] is True


def test_runs_on_deepspeed_and_onto_it(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """The same curve where the engine, the ZeRO stage or both change at τ, and after resuming a
    DeepSpeed run's checkpoint on Megatron's engine in another layout."""
    deepspeed = ["parallel.engine=deepspeed", "optim.name=adamw", "train.save_every=20"]
    runs = {
        "megatron": ["optim.name=adamw"],
        "stage_1_to_3": [*deepspeed, "expansion.0.parallel.zero_stage=3"],
        "stage_3_to_megatron": [
            *deepspeed,
            "parallel.zero_stage=3",
            "expansion.0.parallel.engine=megatron",
            "expansion.0.parallel.zero_stage=1",
            "expansion.0.parallel.tensor=2",
        ],
        "megatron_to_stage_2": [
            "optim.name=adamw",
            "parallel.tensor=2",
            "expansion.0.parallel.tensor=1",
            "expansion.0.parallel.engine=deepspeed",
            "expansion.0.parallel.zero_stage=2",
        ],
    }
    curves = {}
    for name, words in runs.items():
        config = run_config(tmp_path, corpus, name, "train.keep_checkpoints=0", *words)
        assert set(pool.run(2, train_here, config)) == {0}
        curves[name] = losses(config.folder)
    for name, curve in curves.items():
        assert largest_difference(curves["megatron"], curve) < 2e-4, name
    folder = tmp_path / "stage_1_to_3"
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_0000060")
    shutil.rmtree(folder / "checkpoints" / "step_0000040")
    words = ["optim.name=adamw", "train.keep_checkpoints=0", "expansion.0.parallel.pipeline=2"]
    pool.run(2, train_here, run_config(tmp_path, corpus, "stage_1_to_3", *words))
    assert largest_difference(curves["megatron"], losses(folder)) < 2e-4
    assert [e["layout"] for e in events(folder, "resume")] == ["DP=2"]


def test_multi_stage_expansion_and_summary(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    stages = [{"at": 10, "to_layers": 2}, {"at": 0.5, "to_layers": 4, "init": "copying",
                                         "order": "inter"}]  # fmt: skip
    config = run_config(tmp_path, corpus, "multi", "model.num_layers=0", expansion=stages)
    pool.run(1, train_here, config)
    depths = [e["num_layers"] for e in events(config.folder, "train")]
    assert depths == [0] * 10 + [2] * 20 + [4] * 30
    expansions = events(config.folder, "expansion")
    depths = [(e["step"], e["from_layers"], e["to_layers"]) for e in expansions]
    assert depths == [(10, 0, 2), (30, 2, 4)]
    summary = json.loads((config.folder / "summary.json").read_text())
    last = events(config.folder, "train")[-1]
    assert summary["total_flops"] == last["flops"]
    assert summary["total_tokens"] == last["tokens"] == 60 * 8 * 32
    assert summary["final_eval_loss"] == events(config.folder, "eval")[-1]["loss"]
    assert summary["num_layers"] == 4
    assert yaml.safe_load((config.folder / "config.yaml").read_text())["train"]["steps"] == 60


Start = Callable[[Path, int], "subprocess.Popen[bytes]"]


@pytest.fixture
def start_job() -> Iterator[Start]:
    """Starts a job of its own; what still runs when the test ends is killed."""
    jobs: list[subprocess.Popen[bytes]] = []

    def start(config_file: Path, nproc: int) -> subprocess.Popen[bytes]:
        jobs.append(_start_job(config_file, nproc))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.poll() is None:
            kill_everything(job)


def _start_job(config_file: Path, nproc: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megatron_progressive", "train", str(config_file),
               "--nproc", str(nproc)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


def wait_for_step(folder: Path, step: int, job: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and job.poll() is None:
        if any(e.get("step", 0) >= step for e in read_metrics(folder)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came (exit code {job.poll()})")


def kill_everything(job: subprocess.Popen[bytes]) -> None:
    """SIGKILL the job's workers and then itself, as a lost node would."""
    import psutil

    children = psutil.Process(job.pid).children(recursive=True)
    random.Random(0).shuffle(children)
    for process in (*children, psutil.Process(job.pid)):
        process.kill()
    psutil.wait_procs(children)
    job.wait()


@pytest.fixture(scope="module")
def unbroken(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    config = run_config(folder, corpus, "run", "train.micro_batch=2")
    pool.run(2, train_here, config)
    return config.folder


@pytest.mark.parametrize("at_step", [27, 47])
def test_killed_between_saves_and_started_again(
    unbroken: Path, corpus: Path, tmp_path: Path, start_job: Start, at_step: int
) -> None:
    config = run_config(tmp_path, corpus, "run", "train.micro_batch=2")
    file = tmp_path / "config_in.yaml"
    file.write_text(to_yaml(config))
    job = start_job(file, 2)
    wait_for_step(config.folder, at_step, job)
    kill_everything(job)
    assert not (config.folder / "summary.json").exists()
    assert start_job(file, 2).wait(600) == 0
    assert losses(config.folder) == losses(unbroken)
    saved = at_step // 20 * 20
    assert [e["step"] for e in events(config.folder, "resume")] == [saved]
    assert [e["loss"] for e in events(config.folder, "eval")] == [
        e["loss"] for e in events(unbroken, "eval")
    ]
    assert len(events(config.folder, "expansion")) == 1


def test_signals_save_and_exit_75_then_the_run_resumes(
    unbroken: Path, corpus: Path, tmp_path: Path, start_job: Start
) -> None:
    config = run_config(tmp_path, corpus, "run", "train.micro_batch=2")
    file = tmp_path / "config_in.yaml"
    file.write_text(to_yaml(config))
    step = 5
    for number in (signal.SIGTERM, signal.SIGHUP):  # SIGHUP: a terminal that is closed
        job = start_job(file, 2)
        wait_for_step(config.folder, step, job)
        job.send_signal(number)
        assert job.wait(600) == 75
        stopped = int(checkpoints(config.folder)[-1].name.removeprefix("step_"))
        assert step <= stopped < 60
        step = stopped + 3
    assert start_job(file, 2).wait(600) == 0
    assert losses(config.folder) == losses(unbroken)


def test_workers_save_and_end_without_their_launcher(
    corpus: Path, tmp_path: Path, start_job: Start
) -> None:
    """SIGKILL of the launcher, and with it of the store in which the ranks met."""
    import psutil

    config = run_config(tmp_path, corpus, "run", "train.micro_batch=2", "train.steps=5000",
                        "train.save_every=0", expansion=[])  # fmt: skip
    file = tmp_path / "config_in.yaml"
    file.write_text(to_yaml(config))
    job = start_job(file, 2)
    wait_for_step(config.folder, 5, job)
    workers = psutil.Process(job.pid).children()
    assert len(workers) == 2
    job.kill()
    _, alive = psutil.wait_procs(workers, timeout=120)
    for worker in alive:
        worker.kill()
    assert not alive
    (stopped,) = checkpoints(config.folder)
    assert read_whole(stopped)[0].step == read_metrics(config.folder)[-2]["step"] < 5000


def test_config_written_is_the_one_that_ran(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Every key, none of them left at what it would be anyway, and the metrics are of these."""
    words = ["run.seed=7", "optim.name=adamw", "optim.lr=0.0031", "schedule.name=linear",
             "train.steps=6", "train.global_batch=4", "train.micro_batch=2", "train.eval_every=3",
             "train.eval_samples=5", "train.save_every=0", "expansion.0.at=4",
             "expansion.0.to_layers=3", "expansion.0.init=random"]  # fmt: skip
    config = run_config(tmp_path, corpus, "run", *words)
    plain = yaml.safe_load(to_yaml(run_config(tmp_path, corpus, "run")))
    values = yaml.safe_load(to_yaml(config))
    for word in words:
        mine, default = values, plain
        for key in word.split("=")[0].split("."):
            index: Any = int(key) if key.isdigit() else key
            mine, default = mine[index], default[index]
        assert mine != default, word
    pool.run(1, train_here, config)
    assert load(config.folder / "config.yaml") == config
    train, (expansion,) = events(config.folder, "train"), events(config.folder, "expansion")
    assert [event["tokens"] for event in train] == [step * 4 * 32 for step in range(1, 7)]
    rates = [0.0031 * (1 - step / 7) for step in range(1, 7)]
    assert [event["lr"] for event in train] == pytest.approx(rates)
    assert [event["num_layers"] for event in train] == [1] * 4 + [3] * 2
    assert (expansion["to_layers"], expansion["init"]) == (3, "random")
    assert [event["step"] for event in events(config.folder, "eval")] == [0, 3, 4, 6]
