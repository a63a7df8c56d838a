"""A run and what it is trained on: corpora that change meanwhile, tokenizers that go along, and
jobs that find theirs unprepared."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive.checkpoints.checkpoint import checkpoint_path, read_description
from megatron_progressive.checkpoints.inspection import inspect_checkpoint
from megatron_progressive.data import DATA_FILE, read_identity
from megatron_progressive.data.manifest import read_manifest
from megatron_progressive.runs.folder import read_metrics
from tests.checkpoints.altered import alter
from tests.jobs import Job, Jobs

GREEK, FRENCH = "alpha beta gamma delta epsilon zeta eta", "un deux trois quatre cinq six sept"


def write_texts(path: Path, words: str, count: int = 120, mode: str = "w") -> None:
    rng = random.Random(count)
    with open(path, mode) as file:
        for number in range(count):
            text = " ".join(rng.choice(words.split()) for _ in range(40))
            file.write(json.dumps({"text": f"{text} {number}"}) + "\n")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The configuration of a run on ``c.jsonl``, in ``tmp_path/runs``."""
    write_texts(tmp_path / "c.jsonl", GREEK)
    return write_base(tmp_path)


def write_base(folder: Path, **data: Any) -> Path:
    values = {
        "run": {"name": "a", "dir": str(folder / "runs")},
        "model": {"family": "llama3", "num_layers": 1, "hidden_size": 32, "num_attention_heads": 2,
                  "num_query_groups": 1, "ffn_hidden_size": 64},
        "data": {"corpus": str(folder / "c.jsonl"), "tokenizer": "bpe", "vocab_size": 300,
                 "sequence_length": 32, **data},
        "train": {"steps": 8, "global_batch": 4, "micro_batch": 2, "eval_every": 4,
                  "eval_samples": 2, "save_every": 4, "keep_checkpoints": 0},
    }  # fmt: skip
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def losses(folder: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_metrics(folder) if e["event"] == "train"}


def trained(jobs: Jobs, base: Path, *words: str) -> Job:
    job = jobs.run(1, base.parent, ["train", str(base), *words])
    assert job.codes == [0], job.output
    return job


def test_a_corpus_that_changes_between_stop_and_resume(jobs: Jobs, base: Path) -> None:
    runs = base.parent / "runs"
    trained(jobs, base, "run.name=whole")
    trained(jobs, base, "train.stop_after=4")
    identity = read_identity(runs / "a" / DATA_FILE)
    assert identity is not None
    first = checkpoint_path(runs / "a", 4)
    assert read_description(first)[1].data == identity
    assert inspect_checkpoint(first)["model"]["data"]["fingerprint"] == identity.fingerprint
    write_texts(base.parent / "c.jsonl", FRENCH, mode="a")
    job = trained(jobs, base)
    assert f"goes on with {identity.prepared}, prepared then" in job.output[0]
    assert losses(runs / "a") == losses(runs / "whole")
    assert read_identity(runs / "a" / DATA_FILE) == identity
    assert read_description(checkpoint_path(runs / "a", 8))[1].data == identity
    warnings = [e["message"] for e in read_metrics(runs / "a") if e["event"] == "warning"]
    assert len(warnings) == 1
    assert "has changed since" in warnings[0]
    # it is finished, and says that the new text is not in it
    job = trained(jobs, base)
    assert "finished before, nothing to do" in job.output[0]
    assert "has changed since; a new run.name would train on it" in job.output[0]
    # a fresh run is trained on the new text
    trained(jobs, base, "run.name=b")
    other = read_identity(runs / "b" / DATA_FILE)
    assert other is not None
    assert other.fingerprint != identity.fingerprint


def test_without_what_it_was_trained_on_a_run_does_not_go_on(jobs: Jobs, base: Path) -> None:
    runs = base.parent / "runs"
    trained(jobs, base, "train.stop_after=4")
    identity = read_identity(runs / "a" / DATA_FILE)
    assert identity is not None
    write_texts(base.parent / "c.jsonl", FRENCH, mode="a")
    shutil.rmtree(identity.prepared or "")
    before = {p: p.read_bytes() for p in (runs / "a").rglob("*") if p.is_file()}
    job = jobs.run(1, base.parent, ["train", str(base)])
    assert job.codes == [2]
    (line,) = (text for text in job.output[0].splitlines() if text.startswith("mprog: "))
    for part in ("data.corpus: got ", "c.jsonl", str(runs / "a"), str(identity.prepared),
                 "a new run.name"):  # fmt: skip
        assert part in line
    assert {p: p.read_bytes() for p in (runs / "a").rglob("*") if p.is_file()} == before


def test_a_run_of_before_it_was_recorded_goes_on(jobs: Jobs, base: Path) -> None:
    """Its checkpoint says nothing of its data and has no tokenizer."""
    runs = base.parent / "runs"
    trained(jobs, base, "run.name=whole")
    trained(jobs, base, "train.stop_after=4")
    forget(checkpoint_path(runs / "a", 4))
    (runs / "a" / DATA_FILE).unlink()
    job = trained(jobs, base)
    assert "was trained on before was not recorded; it goes on with" in job.output[0]
    assert losses(runs / "a") == losses(runs / "whole")
    assert (runs / "a" / DATA_FILE).is_file()


def forget(checkpoint: Path) -> None:
    """As versions that did not record data saved it."""
    shutil.rmtree(checkpoint / "tokenizer")

    def change(values: dict[str, Any]) -> None:
        del values["model"]["data"]
        values["files"] = {n: size for n, size in values["files"].items() if "tokenizer" not in n}

    alter(checkpoint, change)


def test_exports_have_the_tokenizer_of_their_weights(jobs: Jobs, base: Path, capsys: Any) -> None:
    folder = base.parent
    trained(jobs, base, "train.steps=4")
    identity = read_identity(folder / "runs" / "a" / DATA_FILE)
    assert identity is not None
    write_texts(folder / "c.jsonl", FRENCH, mode="a")
    assert cli.main(["data", "prepare", str(base)]) == 0  # for another run
    checkpoint = checkpoint_path(folder / "runs" / "a", 4)

    def export(name: str) -> Path:
        assert cli.main(["export", "hf", str(checkpoint), str(folder / name)]) == 0
        return folder / name / "tokenizer.json"

    prepared = Path(identity.prepared or "")
    mine = (prepared / "tokenizer" / "tokenizer.json").read_bytes()
    assert export("newer").read_bytes() == mine
    shutil.rmtree(folder / "runs" / "data")
    assert export("gone").read_bytes() == mine
    forget(checkpoint)
    assert cli.main(["data", "prepare", str(base)]) == 0
    capsys.readouterr()
    assert not export("unknown").exists()
    assert "no tokenizer found: exported without one" in capsys.readouterr().err


def test_weights_that_are_there_keep_their_tokenizer(jobs: Jobs, base: Path, capsys: Any) -> None:
    folder = base.parent
    trained(jobs, base, "train.steps=4")
    checkpoint = checkpoint_path(folder / "runs" / "a", 4)
    start = f"run.init_from={checkpoint}"
    write_texts(folder / "c.jsonl", FRENCH, mode="a")
    identity = read_identity(folder / "runs" / "a" / DATA_FILE)
    assert identity is not None
    # bpe: not a new one, for old weights
    trained(jobs, base, start, "run.name=bpe", "train.steps=4")
    again = read_identity(folder / "runs" / "bpe" / DATA_FILE)
    assert again is not None
    assert (again.tokenizer, again.fingerprint == identity.fingerprint) == (
        identity.tokenizer, False,
    )  # fmt: skip
    assert read_manifest(Path(again.prepared or "")).tokenizer == str(checkpoint / "tokenizer")
    # named, the same one and another one
    assert cli.main(["data", "prepare", str(base)]) == 0
    newer = Path(capsys.readouterr().out.strip())
    copy = folder / "copy"
    shutil.copytree(checkpoint / "tokenizer", copy)
    trained(jobs, base, start, "run.name=same", "train.steps=4", f"data.tokenizer={copy}")
    for name, word in (("tokenizer", newer / "tokenizer"), ("prepared", newer)):
        job = jobs.run(
            1, folder, ["train", str(base), start, "run.name=other", f"data.{name}={word}"]
        )
        assert job.codes == [2], job.output
        assert f"data.{name}: got {word}, whose tokenizer is not that of" in job.output[0]
    assert not (folder / "runs" / "other").exists()
    # a run that has begun needs the checkpoint no more
    trained(jobs, base, start, "run.name=long", "train.stop_after=4")
    shutil.move(checkpoint, folder / "away")
    trained(jobs, base, start, "run.name=long")
    # nothing to go by: said
    forget(folder / "away")
    words = [f"run.init_from={folder / 'away'}", "run.name=unknown", "train.steps=4"]
    job = trained(jobs, base, *words)
    assert "away keeps no tokenizer that is read here" in job.output[0]


def slow(seconds: float, timeout: float) -> None:
    """Make a preparation take so long, and a process group wait no longer than that."""
    from megatron_progressive.runtime import distributed

    room: Any = sys.modules["megatron_progressive.data.prepare"]
    run = room._run

    def slowly(*arguments: Any) -> None:
        time.sleep(seconds)
        run(*arguments)

    room._run = slowly
    distributed.TIMEOUT = timedelta(seconds=timeout)


def test_a_job_prepares_its_corpus_for_as_long_as_it_takes(jobs: Jobs, base: Path) -> None:
    job = jobs.run(
        2, base.parent, ["train", str(base)], ("tests.runs.test_trained_on", "slow", (12, 6))
    )
    assert job.codes == [0, 0], job.output
    assert job.output[1].count("rank 1: waits while rank 0 prepares the corpus") == 1
    said = f"rank 0 prepares it while 1 of the job wait (`mprog data prepare {base}` does that"
    assert job.output[0].count(f"is not prepared yet: {said} before a job") == 1
    assert len(list((base.parent / "runs" / "data").iterdir())) == 1


def unlucky() -> None:
    room: Any = sys.modules["megatron_progressive.data.prepare"]

    def fails(*_: Any) -> None:
        raise OSError("no space left")

    room._run = fails


def test_a_preparation_that_fails_ends_the_job(jobs: Jobs, base: Path) -> None:
    job = jobs.run(
        2, base.parent, ["train", str(base)], ("tests.runs.test_trained_on", "unlucky", ())
    )
    assert job.hung == []
    assert job.codes == [1, 1]
    last = job.output[1].strip().splitlines()[-1]
    assert last == "rank 1: rank 0, which prepares the corpus, failed: no space left"
    assert not (base.parent / "runs" / "a").exists()
    refused = jobs.run(2, base.parent, ["train", str(base), "data.vocab_size=100"])
    assert refused.codes == [2, 2]
    for output in refused.output:
        assert "mprog: data.vocab_size: got 100" in output


def test_a_pilot_has_both_runs_on_one_corpus(jobs: Jobs, base: Path) -> None:
    """The corpus changes between them."""
    from megatron_progressive.compare.pilot import plan_pilot
    from megatron_progressive.compare.run_pilot import _on_the_same
    from megatron_progressive.config import load

    words = ["train.steps=400", "model.num_layers=0",
             "expansion=[{at: 0.5, to_layers: 1}]"]  # fmt: skip
    pilot = plan_pilot(load(base, words), 100)
    assert _on_the_same(pilot.progressive, pilot) == pilot.progressive
    trained(jobs, base, f"run.name={pilot.fixed.run.name}", "train.steps=4")
    identity = read_identity(pilot.fixed.folder / DATA_FILE)
    assert identity is not None
    for arm, _ in pilot.files:
        assert _on_the_same(arm, pilot).data.prepared == identity.prepared
