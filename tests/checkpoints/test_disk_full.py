"""A full disk, at every moment: one line that says what could not be written, and what was saved
before stays whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive.checkpoints.checkpoint import checkpoint_path, read_whole
from megatron_progressive.config import to_yaml
from megatron_progressive.runs.folder import read_metrics
from tests.disk import Disk, small_disk
from tests.jobs import Jobs
from tests.train.small_runs import run_config


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def started(folder: Path, disk: Disk, corpus: Path, *words: str) -> list[str]:
    """The words of a run on the disk that saves every third of nine steps."""
    words = ("train.steps=9", "train.save_every=3", "train.eval_every=9", "train.micro_batch=2",
             *words)  # fmt: skip
    config = run_config(disk.folder, corpus, "run", *words, expansion=[])
    (folder / "in.yaml").write_text(to_yaml(config))
    return ["train", str(folder / "in.yaml")]


def test_a_save_that_does_not_fit(jobs: Jobs, corpus: Path, tmp_path: Path, disk: Disk) -> None:
    words = started(tmp_path, disk, corpus)
    run = disk.folder / "run"
    assert jobs.run(2, tmp_path, [*words, "train.stop_after=3"]).codes == [0, 0]
    saved = checkpoint_path(run, 3)
    with disk.full(free=200_000) as prepare:
        job = jobs.run(2, tmp_path, words, prepare)
    assert (job.codes, job.hung) == ([1, 1], [])
    cause = f"{disk.words} while saving step 6 to {checkpoint_path(run, 6)}"
    last = [output.splitlines()[-1] for output in job.output]
    for rank in range(2):
        assert last[rank].startswith(f"rank {rank}: ")
        assert last[rank].endswith(cause)
        assert "Traceback" not in job.output[rank]
    assert any(last[rank] == f"rank {rank}: {cause}" for rank in range(2))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert read_whole(saved)[0].step == 3
    job = jobs.run(2, tmp_path, words)
    assert job.codes == [0, 0]
    assert "resumed after step 3" in job.output[0]
    assert "Warning" not in job.output[0]  # of torch's and Megatron-core's code to each other
    steps = [e["step"] for e in read_metrics(run) if e["event"] == "train"]
    assert steps == list(range(1, 10))


@pytest.mark.parametrize(("free", "file"), [(0, "config.yaml"), (16_000, "metrics.jsonl")])
def test_a_run_folder_that_does_not_fit(
    jobs: Jobs, corpus: Path, tmp_path: Path, disk: Disk, free: int, file: str
) -> None:
    words = started(tmp_path, disk, corpus, "train.steps=120", "train.save_every=0",
                    "train.eval_every=120", f"run.name={'n' * 100}")  # fmt: skip
    with disk.full(free) as prepare:
        if prepare is not None and file == "config.yaml":
            pytest.skip("a limit is on large files alone")
        job = jobs.run(1, tmp_path, words, prepare)
    assert job.codes == [1]
    folder = disk.folder / ("n" * 100)
    what = f"writing {folder / file}" if file == "metrics.jsonl" else f"making {folder}"
    last = job.output[0].splitlines()[-1]
    assert last.startswith(f"rank 0: {disk.words}")
    assert last.endswith(f" while {what}")
    assert "Traceback" not in job.output[0]


@pytest.mark.parametrize("free", [0, 40_000])
def test_a_corpus_that_does_not_fit(tmp_path: Path, disk: Disk, capfd: Any, free: int) -> None:
    with open(tmp_path / "corpus.jsonl", "w") as file:
        for number in range(2000):
            file.write(json.dumps({"text": f"{number} " + "alpha beta gamma " * 8}) + "\n")
    values = {"run": {"dir": str(disk.folder)}, "model": {"family": "gpt2", "preset": "tiny"},
              "data": {"corpus": str(tmp_path / "corpus.jsonl"), "vocab_size": 300,
                       "sequence_length": 32}}  # fmt: skip
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(values))
    with disk.full(free):
        assert cli.main(["data", "prepare", str(tmp_path / "in.yaml")]) == 1
    *told, last = capfd.readouterr().err.strip().splitlines()
    assert all(line.startswith("data: ") for line in told)
    assert last.startswith(f"mprog: {disk.words}")
    assert f"while preparing {disk.folder / 'data'}" in last
    assert list((disk.folder / "data").iterdir()) == []
