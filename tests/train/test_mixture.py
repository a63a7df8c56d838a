"""Runs on mixtures and with several validation sets: the same samples on every layout, and losses
and bits per byte that transformers finds as well."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_progressive import data as data_room
from megatron_progressive.checkpoints.checkpoint import checkpoint_path
from megatron_progressive.config import ConfigError, RunConfig, from_dict
from megatron_progressive.data.megatron import indexed_dataset
from megatron_progressive.huggingface.exporting import export_checkpoint, plan_export
from megatron_progressive.runs.folder import look, read_metrics
from megatron_progressive.runs.reading import read_run
from megatron_progressive.runs.trackers import TRACKERS, Trackers
from megatron_progressive.train.job import _settled
from tests.data.small_corpora import make_documents, quiet, write_json_lines
from tests.pool import Pool
from tests.train.small_runs import run_values, train_here

LENGTH = 32


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for seed, (name, count) in enumerate({"a": 90, "b": 60, "c": 30, "w": 40}.items()):
        write_json_lines(folder / f"{name}.jsonl", make_documents(count, seed + 1))
    return folder


def config_on(texts: Path, folder: Path, name: str, *words: str, **data: Any) -> RunConfig:
    """A tiny run of 12 steps, which grows after the sixth, on three parts."""
    mix = [{"corpus": str(texts / f"{part}.jsonl"), "weight": weight}
           for part, weight in (("a", 0.7), ("b", 0.2), ("c", 0.1))]  # fmt: skip
    values = run_values(
        folder, folder, name,
        data={"mix": mix, "vocab_size": 300, "sequence_length": LENGTH,
              "validation_fraction": 0.2} | data,
        train={"steps": 12, "global_batch": 8, "micro_batch": 4, "eval_every": 6,
               "eval_tokens": 11 * LENGTH, "save_every": 4},
        expansion=[{"at": 6, "to_layers": 2, "init": "copying"}],
    )  # fmt: skip
    values["data"] = {key: value for key, value in values["data"].items() if value is not None}
    return from_dict(values, words)


def events(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(config.folder) if event["event"] == kind]


def test_a_mixture_goes_on_with_its_samples_on_other_layouts(
    pool: Pool, texts: Path, tmp_path: Path
) -> None:
    whole = config_on(texts, tmp_path, "whole")
    data_room.settle(whole, None, quiet)
    assert pool.run(1, train_here, whole) == [0]
    wanted = {event["step"]: event["loss"] for event in events(whole, "train")}
    assert len(wanted) == 12
    for name, *layout in (("tp2", "parallel.tensor=2"), ("ds", "parallel.engine=deepspeed",
                          "parallel.zero_stage=2")):  # fmt: skip
        config = config_on(texts, tmp_path, name, "train.stop_after=7")
        assert pool.run(1, train_here, config) == [0]
        config = config_on(texts, tmp_path, name, *layout)
        assert pool.run(2, train_here, config) == [0, 0]
        found = {event["step"]: event["loss"] for event in events(config, "train")}
        assert found.keys() == wanted.keys()
        assert max(abs(found[step] / wanted[step] - 1) for step in wanted) < 1e-4
    # what it was trained on is in the folder and in the checkpoint; other data is refused by name
    run = read_run(whole.folder)
    assert run.trained_on is not None
    assert [Path(part.corpus).name for part in run.trained_on.parts] == [
        "a.jsonl", "b.jsonl", "c.jsonl"
    ]  # fmt: skip
    mix = json.loads(json.dumps([vars(part) for part in whole.data.mix or []]))
    for part in mix:
        part["prepared"] = run.trained_on.parts[0].prepared
    other = config_on(texts, tmp_path, "whole", "train.steps=12", mix=mix)
    position, _ = look(other)
    with pytest.raises(ConfigError) as caught:
        _settled(other, position)
    assert "data.mix: got a mix of" in str(caught.value) or "not what" in str(caught.value)
    weights = config_on(texts, tmp_path, "whole", "data.mix.0.weight=0.6")
    with pytest.raises(ConfigError, match=r"holds a run with data\.mix\.0\.weight=0\.7, got 0\.6"):
        look(weights)


def stream_of(folder: Path, split: str) -> list[list[int]]:
    """The documents of a prepared split, as Megatron-core reads them."""
    dataset = indexed_dataset().IndexedDataset(str(folder / split))
    return [dataset.get(n).tolist() for n in range(len(dataset))]


def test_validation_is_what_transformers_finds(pool: Pool, texts: Path, tmp_path: Path) -> None:
    import transformers

    config = config_on(
        texts, tmp_path, "run", "train.save_every=0", mix=None, corpus=str(texts / "a.jsonl"),
        validation={"wiki": str(texts / "w.jsonl"),
                    "b": {"corpus": str(texts / "b.jsonl"), "split": "validation"}},
    )  # fmt: skip
    found, _ = data_room.settle(config, None, quiet)
    assert pool.run(1, train_here, config) == [0]
    evals = events(config, "eval")
    assert [event["step"] for event in evals] == [0, 6, 12]  # the start, τ and the end
    assert evals[0]["loss"] == pytest.approx(math.log(300), rel=0.05)
    out = tmp_path / "exported"
    export_checkpoint(plan_export(checkpoint_path(config.folder, 12), out))
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    end = tokenizer.eos_token_id
    sets = {
        "held_out": (found.folders[0], "validation", "a"),
        "wiki": (found.validation["wiki"].folders[0], "train", "w"),
        "b": (found.validation["b"].folders[0], "validation", "b"),
    }
    summary = read_run(config.folder).summary
    assert summary is not None
    for name, (folder, split, file) in sets.items():
        texts_of = [json.loads(line)["text"] for line in (texts / f"{file}.jsonl").open()]
        own = [[*tokenizer(text, split_special_tokens=True)["input_ids"], end] for text in texts_of]
        documents = stream_of(folder, split)
        both = documents + stream_of(folder, {"train": "validation"}.get(split, "train"))
        assert sorted(both) == sorted(own)  # the whole file, as transformers tokenizes it
        stream = [token for document in documents for token in document]
        samples = min(11, (len(stream) - 1) // LENGTH)
        rows = torch.tensor([stream[n * LENGTH : (n + 1) * LENGTH + 1] for n in range(samples)])
        with torch.no_grad():
            logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        # the targets follow each other, so that no character is cut but at the two ends
        targets = [token for token in stream[1 : samples * LENGTH + 1] if token != end]
        text_bytes = len(tokenizer.backend_tokenizer.decode(targets).encode())
        cut = tokenizer.backend_tokenizer.decode(targets).count("\ufffd")
        assert cut == 0, "the sample ends inside of a character: the oracle cannot count it"
        bits = float(loss) * samples * LENGTH / (math.log(2) * text_bytes)
        ours = evals[-1] if name == "held_out" else evals[-1]["sets"][name]
        assert ours["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert ours["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert summary["final_bits_per_byte"] == evals[-1]["bits_per_byte"]
    assert summary["final_sets"] == evals[-1]["sets"]
    run = read_run(config.folder)
    assert run.sets["wiki"]["loss"].tolist() == [e["sets"]["wiki"]["loss"] for e in evals]
    assert run.evals["bits_per_byte"].tolist() == [e["bits_per_byte"] for e in evals]


def test_every_batch_and_layout_validates_the_same(pool: Pool, texts: Path, tmp_path: Path) -> None:
    found = []
    runs = {
        "one": (1,),
        "two": (2, "train.micro_batch=2"),
        "wide": (2, "parallel.tensor=2", "train.global_batch=4"),
    }
    for name, (ranks, *words) in runs.items():
        config = config_on(texts, tmp_path, name, *words, "train.steps=7",
                           validation={"wiki": str(texts / "w.jsonl")})  # fmt: skip
        data_room.settle(config, None, quiet)
        assert set(pool.run(ranks, train_here, config)) == {0}
        found.append(events(config, "eval")[0])
    for other in found[1:]:  # before the first step all have the same weights
        assert other["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
        assert other["sets"]["wiki"] == pytest.approx(found[0]["sets"]["wiki"], rel=1e-6)


def test_trackers_get_every_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logged: dict[str, float] = {}

    class Kept:
        def log(self, numbers: dict[str, float], step: int) -> None:
            logged.update(numbers)

    monkeypatch.setitem(TRACKERS, "tensorboard", lambda *_: Kept())
    values = run_values(tmp_path, tmp_path, "a")
    trackers = Trackers(from_dict(values, ["train.trackers=[tensorboard]"]), None)
    trackers.event("eval", {"step": 3, "loss": 2.0, "bits_per_byte": 1.5,
                            "sets": {"wiki": {"loss": 4.0, "bits_per_byte": 0.5}}})  # fmt: skip
    assert logged == {"eval/loss": 2.0, "eval/bits_per_byte": 1.5, "eval/wiki/loss": 4.0,
                      "eval/wiki/bits_per_byte": 0.5}  # fmt: skip
    assert np.isfinite(list(logged.values())).all()
