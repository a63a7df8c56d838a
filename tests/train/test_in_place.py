"""A run on tokens that Megatron-LM has written, against one on our own preparation of the text."""

from __future__ import annotations

from pathlib import Path

from megatron_progressive import config as configuration
from megatron_progressive import data
from megatron_progressive.runs.folder import read_metrics
from tests.data.small_corpora import make_documents, preprocess, quiet, write_json_lines
from tests.pool import Pool
from tests.train.small_runs import run_values, train_here

TEXTS = make_documents(400)


def test_the_losses_are_those_of_our_own_preparation(pool: Pool, tmp_path: Path) -> None:
    from megatron_progressive.data.tokenizer import train_bpe

    train_bpe(TEXTS, 300).save(tmp_path / "tokens")
    preprocess(tmp_path / "theirs", tmp_path / "tokens", TEXTS)
    corpora = {
        "own": str(write_json_lines(tmp_path / "c.jsonl", TEXTS)),
        "theirs": f"megatron:{tmp_path}/theirs",
    }
    losses = {}
    for name, corpus in corpora.items():
        values = run_values(tmp_path / "runs", tmp_path, name)
        values["data"] = {"corpus": corpus, "tokenizer": str(tmp_path / "tokens"),
                          "vocab_size": 300, "sequence_length": 32,
                          "validation_fraction": 0.1}  # fmt: skip
        values["train"] |= {"steps": 6, "eval_every": 6, "save_every": 0}
        values["expansion"][0]["at"] = 3
        config = configuration.from_dict(values)
        data.check(config)
        data.prepare(config, quiet)
        assert pool.run(2, train_here, config) == [0, 0]
        losses[name] = [
            (event["event"], event["loss"])
            for event in read_metrics(config.folder)
            if event["event"] in ("train", "eval")
        ]
    assert len(losses["own"]) > 7
    assert losses["theirs"] == losses["own"]
