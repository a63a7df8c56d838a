"""One job a run folder: the second is refused, and what it finds is read when it is its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive.config import to_yaml
from megatron_progressive.runs.folder import read_metrics
from megatron_progressive.runtime.folder_lock import LOCK_NAME, FolderLock
from tests.jobs import Jobs
from tests.runs.test_ends import WORDS, arguments, contents
from tests.train.small_runs import run_config, run_values


@pytest.fixture
def stopped(jobs: Jobs, corpus: Path, tmp_path: Path) -> Path:
    """A run that has more to do."""
    job = jobs.run(1, tmp_path, arguments(tmp_path, corpus, "train.stop_after=4"))
    assert job.codes == [0], job.output
    assert not (tmp_path / "run" / LOCK_NAME).exists()
    return tmp_path / "run"


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_second_job_is_refused_in_one_line(
    jobs: Jobs, stopped: Path, corpus: Path, ranks: int
) -> None:
    words = arguments(stopped.parent, corpus, "train.micro_batch=4")
    with FolderLock(stopped / LOCK_NAME):
        before = contents(stopped)
        job = jobs.run(ranks, stopped.parent, words)
        assert job.codes == [2] * ranks, job.output
        (line,) = "".join(job.output).strip().splitlines()
        assert line.startswith(f"mprog: run.name: {stopped} is in use by another job, process ")
        assert f"process {os.getpid()} on " in line
        assert "accepted: " in line
        assert contents(stopped) == before
    assert jobs.run(ranks, stopped.parent, words).codes == [0] * ranks
    assert not (stopped / LOCK_NAME).exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [(["train"], "run"), (["train", "--nproc", "2"], "run"), (["pilot"], "run_pilot_fixed")],
)
def test_every_way_to_start_one_is_refused(
    corpus: Path, tmp_path: Path, capfd: Any, command: list[str], name: str
) -> None:
    values = run_values(tmp_path, corpus, "run")
    values["train"]["steps"] = 200
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(values))
    with FolderLock(tmp_path / name / LOCK_NAME):
        code = cli.main([*command, str(tmp_path / "in.yaml")])
        lines = capfd.readouterr().err.strip().splitlines()
        assert code == 2
        assert f"{tmp_path / name} is in use by another job" in lines[-1]
        assert [p.name for p in (tmp_path / name).iterdir()] == [LOCK_NAME]
    assert not any((tmp_path / name).iterdir())


def another_goes_on_meanwhile(done: str, folder: str) -> None:
    """Between this job's first look at the folder and its lock."""
    acquire = FolderLock.acquire

    def late(lock: FolderLock) -> None:
        shutil.rmtree(folder)
        shutil.copytree(done, folder)
        acquire(lock)

    FolderLock.acquire = late  # type: ignore[method-assign]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_another_job_has_done_meanwhile_counts(
    jobs: Jobs, stopped: Path, corpus: Path, tmp_path: Path, ranks: int
) -> None:
    done = tmp_path / "done"
    shutil.copytree(stopped, done)
    config = run_config(tmp_path, corpus, "run", *WORDS, "train.stop_after=6", expansion=[])
    (tmp_path / "other.yaml").write_text(to_yaml(config))
    assert jobs.run(1, tmp_path, ["train", str(tmp_path / "other.yaml")]).codes == [0]
    further, short = tmp_path / "further", stopped
    stopped.rename(further)
    done.rename(short)
    words = arguments(tmp_path, corpus, "train.micro_batch=4")
    prepare = (__name__, "another_goes_on_meanwhile", (str(further), str(short)))
    job = jobs.run(ranks, tmp_path, words, prepare)
    assert job.codes == [0] * ranks, job.output
    assert [e["step"] for e in read_metrics(short) if e["event"] == "resume"] == [4, 6]


def lose_the_lock(folder: str) -> None:
    from megatron_progressive.train import loop

    step = loop._Run.train_step

    def then_lose(run: Any, number: int, wants_stop: bool) -> bool:
        shutil.rmtree(Path(folder) / LOCK_NAME, ignore_errors=True)
        return step(run, number, wants_stop)

    loop._Run.train_step = then_lose  # type: ignore[method-assign]


def test_a_job_whose_lock_was_broken_saves_no_more(jobs: Jobs, stopped: Path, corpus: Path) -> None:
    prepare = (__name__, "lose_the_lock", (str(stopped),))
    job = jobs.run(1, stopped.parent, arguments(stopped.parent, corpus), prepare)
    assert job.codes == [1]
    assert "is no longer this job's" in job.output[0].strip().splitlines()[-1]
    assert [p.name for p in (stopped / "checkpoints").iterdir()] == ["step_0000004"]


def test_a_folder_with_nothing_but_a_start_that_was_killed_is_new(
    jobs: Jobs, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / LOCK_NAME).mkdir(parents=True)
    (tmp_path / "run" / f"{LOCK_NAME}.abc").mkdir()
    (tmp_path / "run" / ".config.yaml.tmp").write_text("ru")
    job = jobs.run(1, tmp_path, arguments(tmp_path, corpus, "train.stop_after=1"))
    assert job.codes == [0], job.output


def fail_to_build() -> None:
    from megatron_progressive.train import loop

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    loop.make_engine = fail


def test_a_run_that_cannot_begin_leaves_no_folder(jobs: Jobs, corpus: Path, tmp_path: Path) -> None:
    job = jobs.run(1, tmp_path, arguments(tmp_path, corpus), (__name__, "fail_to_build", ()))
    assert job.codes == [1]
    assert "no memory" in job.output[0]
    assert not (tmp_path / "run").exists()
