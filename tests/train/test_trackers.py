"""TensorBoard and Weights & Biases get the numbers of ``metrics.jsonl``, each step once."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive.config import to_yaml
from megatron_progressive.train.run_folder import read_metrics
from tests.jobs import Jobs
from tests.train.cases import run_config

WORDS = ["train.steps=12", "train.save_every=4", "train.eval_every=6", "expansion.0.at=6"]


def train(jobs: Jobs, corpus: Path, folder: Path, *words: str) -> Path:
    """Two ranks; the run folder."""
    config = run_config(folder, corpus, "run", *WORDS, *words)
    (folder / "run.yaml").write_text(to_yaml(config))
    job = jobs.run(2, folder, ["train", str(folder / "run.yaml")])
    assert job.codes == [0, 0], job.output
    return config.folder


def go_back(folder: Path) -> None:
    """As if the run had been killed after its last step and before the save."""
    shutil.rmtree(folder / "checkpoints" / "step_0000012")
    (folder / "summary.json").unlink()


def test_tensorboard_reads_what_the_metrics_say(jobs: Jobs, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["train.trackers=[tensorboard]"]
    folder = train(jobs, corpus, tmp_path, *words)
    go_back(folder)
    train(jobs, corpus, tmp_path, *words)  # from step 8
    assert [e["step"] for e in read_metrics(folder) if e["event"] == "resume"] == [8]
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    for kind, name in (("train", "loss"), ("train", "lr"), ("train", "num_layers"),
                       ("eval", "loss"), ("expansion", "loss_after")):  # fmt: skip
        wanted = [(e["step"], e[name]) for e in read_metrics(folder) if e["event"] == kind]
        scalars = [(s.step, s.value) for s in found.Scalars(f"{kind}/{name}")]
        assert [step for step, _ in scalars] == [step for step, _ in wanted]
        assert [v for _, v in scalars] == pytest.approx([v for _, v in wanted], rel=1e-6)
    # rank 0 alone, once a start
    assert len(list((folder / "tensorboard").iterdir())) == 2


def test_wandb_writes_offline_in_the_run_folder(jobs: Jobs, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = train(jobs, corpus, tmp_path, "train.trackers=[wandb]")
    go_back(folder)
    train(jobs, corpus, tmp_path, "train.trackers=[wandb]")
    records = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(records) == 2
    assert len({path.name for path in records}) == 1  # the same run, gone on with
    assert all(b"train/loss" in path.read_bytes() for path in records)


def test_nothing_is_tracked_by_default(jobs: Jobs, corpus: Path, tmp_path: Path) -> None:
    folder = train(jobs, corpus, tmp_path)
    present = {path.name for path in folder.iterdir()}
    assert present == {"config.yaml", "metrics.jsonl", "checkpoints", "summary.json"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[wandb]", "train.trackers: got wandb, whose package is not installed"),
        ("[tensorbord]", "train.trackers: got 'tensorbord'; accepted: tensorboard, wandb"),
        ("[3]", "train.trackers[0]: got 3; accepted: text"),
        ("wandb", "train.trackers: got 'wandb'; accepted: a list"),
    ],
)
def test_refusals(
    tmp_path: Path, corpus: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, value: str,
    said: str,
) -> None:  # fmt: skip
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "wandb" else find(n, *a)
    )
    (tmp_path / "run.yaml").write_text(to_yaml(run_config(tmp_path, corpus, "run", *WORDS)))
    assert cli.main(["train", str(tmp_path / "run.yaml"), f"train.trackers={value}"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
