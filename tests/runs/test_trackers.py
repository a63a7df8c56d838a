"""TensorBoard and Weights & Biases get the numbers of ``metrics.jsonl``, each step once."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive.config import to_yaml
from megatron_progressive.runs.folder import read_metrics
from tests.jobs import Jobs
from tests.train.small_runs import run_config

WORDS = ["train.steps=12", "train.save_every=4", "train.eval_every=6", "expansion.0.at=6"]


def move_home(home: str) -> None:
    """In a rank, before it starts."""
    os.environ["HOME"] = home
    for name in list(os.environ):
        if name.startswith(("XDG_", "WANDB_")):
            del os.environ[name]


def train(jobs: Jobs, corpus: Path, folder: Path, *words: str) -> Path:
    """Two ranks, whose home is ``folder/home``; the run folder."""
    (folder / "home").mkdir(exist_ok=True)
    config = run_config(folder, corpus, "run", *WORDS, *words)
    (folder / "run.yaml").write_text(to_yaml(config))
    job = jobs.run(2, folder, ["train", str(folder / "run.yaml")],
                   prepare=(__name__, "move_home", [str(folder / "home")]))  # fmt: skip
    assert job.codes == [0, 0], job.output
    assert not list((folder / "home").iterdir())
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
    for kind, name in ((kind, name) for kind, names in NUMBERS.items() for name in names):
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
    found: dict[tuple[str, int], float] = {}
    for path in sorted(records):  # by time; the later start replaces what the earlier one had
        found |= wandb_numbers(path)
    assert found == {
        (f"{e['event']}/{name}", e["step"]): e[name]
        for e in read_metrics(folder)
        for name in NUMBERS.get(e["event"], ())
    }


NUMBERS = {"train": ["loss", "lr", "num_layers"], "eval": ["loss"], "expansion": ["loss_after"]}


def wandb_numbers(path: Path) -> dict[tuple[str, int], float]:
    """Those of :data:`NUMBERS` in a file of Weights & Biases, by name and step: records of
    protobuf in LevelDB's log format, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    names = {f"{event}/{name}" for event, names in NUMBERS.items() for name in names}
    found: dict[tuple[str, int], float] = {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a header does not cross blocks
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # full, last
            continue
        items = Record.FromString(whole).history.item
        values = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
        found |= {(name, values["step"]): values[name] for name in names & values.keys()}
        whole = b""
    return found


def test_nothing_is_tracked_by_default(jobs: Jobs, corpus: Path, tmp_path: Path) -> None:
    folder = train(jobs, corpus, tmp_path)
    present = {path.name for path in folder.iterdir()}
    assert present == {
        "config.yaml", "data.json", "metrics.jsonl", "checkpoints", "summary.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[wandb]", "train.trackers: got wandb, whose package is not installed"),
        ("[tensorbord]", "train.trackers[0]: got 'tensorbord'; accepted: tensorboard, wandb"),
        ("[3]", "train.trackers[0]: got '3'; accepted: tensorboard, wandb"),
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
