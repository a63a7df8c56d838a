"""Tokens that Megatron has written, trained on where they lie."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_progressive import data as data_room
from megatron_progressive.config import RunConfig
from megatron_progressive.data import TrainingData, settle
from megatron_progressive.data.manifest import read_manifest
from megatron_progressive.data.tokenizer import train_bpe
from tests.data.small_corpora import (
    config_error,
    listing,
    make_config,
    make_documents,
    preprocess,
    quiet,
    write_json_lines,
)

TEXTS = [*make_documents(150), "café\n\n", "  two\twords "]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    train_bpe(TEXTS, 300).save(tmp_path / "tokens")
    return tmp_path / "tokens"


def on(tmp_path: Path, tokens: Path, corpus: object, **more: Any) -> RunConfig:
    more = {"validation_fraction": 0.1, "tokenizer": tokens, **more}
    return make_config(tmp_path, corpus, **more)


@pytest.mark.parametrize("sentences", [False, True])
@pytest.mark.parametrize("fraction", [0.1, 0.0001])
def test_the_batches_are_those_of_our_own_preparation(
    tmp_path: Path, tokens: Path, sentences: bool, fraction: float
) -> None:
    corpus = write_json_lines(tmp_path / "c.jsonl", TEXTS)
    own = on(tmp_path, tokens, corpus, validation_fraction=fraction)
    data_room.prepare(own, quiet)
    for name, part in (("a_text_document", TEXTS[:60]), ("b_text_document", TEXTS[60:])):
        preprocess(tmp_path / name, tokens, part, sentences=sentences)
    theirs = on(
        tmp_path, tokens, f"megatron:{tmp_path}/a_text_document,{tmp_path}/b_text_document",
        validation_fraction=fraction,
    )  # fmt: skip
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*_text_document.*")}
    data_room.check(theirs)
    folder = data_room.prepare(theirs, quiet)
    assert folder is not None
    assert folder.name.startswith("a_text_document-")
    assert not [name for name in listing(folder) if name.endswith(".bin")]  # no copy
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*_text_document.*")} == before
    one, two = TrainingData.open(own), TrainingData.open(theirs)
    assert len(one.train) == len(two.train) > 500
    assert torch.equal(one.train_batch(0, 2000), two.train_batch(0, 2000))
    count = one.validation_samples
    assert torch.equal(one.validation_batch(0, count), two.validation_batch(0, count))
    # known as the same content
    assert settle(own, None, quiet)[0].fingerprint == settle(theirs, None, quiet)[0].fingerprint
    splits = [read_manifest(data_room.prepared_folder(c)).splits for c in (own, theirs)]
    assert splits[0] == splits[1]


def test_documents_without_an_end_are_taken_with_a_word(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(tmp_path / "d", tokens, TEXTS, append_eod=False)
    config = on(tmp_path, tokens, f"megatron:{tmp_path}/d")
    data_room.prepare(config)
    assert (
        f"{len(TEXTS)} of {len(TEXTS)} documents do not end with <|endoftext|>"
        in capsys.readouterr().err
    )
    data = TrainingData.open(config)
    size = sum(split.tokens for split in data.manifest.splits.values())
    assert size == (tmp_path / "d.bin").stat().st_size // 2


def test_files_that_change_are_refused(tmp_path: Path, tokens: Path) -> None:
    preprocess(tmp_path / "d", tokens, TEXTS)
    config = on(tmp_path, tokens, f"megatron:{tmp_path}/d")
    folder = data_room.prepare(config, quiet)
    assert folder is not None
    named = on(tmp_path, tokens, f"megatron:{tmp_path}/d", prepared=folder)
    TrainingData.open(named)
    os.utime(tmp_path / "d.bin", (1, 1))
    with config_error("data.prepared", "d.bin, which has changed since"):
        TrainingData.open(named)
    (tmp_path / "d.bin").unlink()
    with config_error("data.prepared", "d.bin, which does not exist"):
        TrainingData.open(named)


def spoil(tmp_path: Path, what: str) -> None:
    """Make one thing wrong with ``d.bin`` and ``d.idx``."""
    idx, tokens = tmp_path / "d.idx", tmp_path / "d.bin"
    content = bytearray(idx.read_bytes())
    match what:
        case "shorter":
            os.truncate(tokens, tokens.stat().st_size - 2)
        case "longer":
            tokens.write_bytes(tokens.read_bytes() + b"\0\0")
        case "cut idx":
            os.truncate(idx, len(content) - 9)
        case "no idx":
            idx.write_bytes(b"words " * 99)
        case "missing":
            idx.unlink()
        case "length":  # of the first sequence; the magic, version, type and two counts before it
            place = 9 + 8 + 1 + 8 + 8
            content[place : place + 4] = struct.pack("<i", 7)
            idx.write_bytes(content)
        case "token":
            numbers = np.fromfile(tokens, np.uint16)
            numbers[5] = 299 + 1
            numbers.tofile(tokens)


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("shorter", "bytes of tokens in a row while d.bin has"),
        ("longer", "bytes of tokens in a row while d.bin has"),
        ("length", "bytes of tokens in a row while d.bin has"),
        ("cut idx", "d.idx"),
        ("no idx", "d.idx cannot be read"),
        ("missing", "d.idx does not exist"),
    ],
)
def test_files_that_do_not_fit_each_other(
    tmp_path: Path, tokens: Path, what: str, part: str
) -> None:
    preprocess(tmp_path / "d", tokens, TEXTS)
    spoil(tmp_path, what)
    config = on(tmp_path, tokens, f"megatron:{tmp_path}/d")
    before = listing(tmp_path)
    for act in (data_room.check, lambda c: data_room.prepare(c, quiet)):
        with config_error("data.corpus", f"megatron:{tmp_path}/d", part):
            act(config)
    assert listing(tmp_path) == before


def test_tokens_of_another_tokenizer(tmp_path: Path, tokens: Path) -> None:
    preprocess(tmp_path / "d", tokens, TEXTS)
    spoil(tmp_path, "token")
    config = on(tmp_path, tokens, f"megatron:{tmp_path}/d")
    with config_error("data.corpus", "with token 300, which"):
        data_room.prepare(config, quiet)
    assert listing(tmp_path / "runs") == ["data"]
    with config_error("data.tokenizer", "got 'bpe' with megatron:"):
        data_room.check(on(tmp_path, tokens, f"megatron:{tmp_path}/d", tokenizer="bpe"))
    with config_error("data.corpus", "does not exist", "megatron:PREFIX"):
        data_room.check(on(tmp_path, tokens, "megatron:"))


def test_nested_fields(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from tests.data.test_corpus import read

    rows: list[dict[str, Any]] = [
        {"id": n, "a": {"b": {"c": text}, "d": 1}} for n, text in enumerate(TEXTS)
    ]
    rows[3]["a"]["b"]["c"] = None
    rows[4]["a"] = None
    expected = [text for n, text in enumerate(TEXTS) if n not in (3, 4)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.json").write_text(json.dumps(rows))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    with pyarrow.ipc.new_file(tmp_path / "r.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("r.jsonl", "r.json", "r.parquet", "r.arrow"):
        assert read(tmp_path / name, text_field="a.b.c") == expected, name
        with config_error("data.text_field", "got 'a.c'", "(id, a.b.c, a.d)"):
            read(tmp_path / name, text_field="a.c")
    (tmp_path / "s.jsonl").write_text('{"a.b": "plain", "a": {"b": "nested"}}\n')
    assert read(tmp_path / "s.jsonl", text_field="a.b") == ["plain"]


def test_nothing_is_shared_among_hosts_or_processes(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(tmp_path / "d", tokens, TEXTS)
    config = on(tmp_path, tokens, f"megatron:{tmp_path}/d")
    with config_error("--shard", f"0/2 with data.corpus megatron:{tmp_path}/d"):
        data_room.prepare_shard(config, data_room.shard_of("0/2"))
    assert data_room.is_unprepared(config)
    data_room.prepare(config, quiet, workers=2)
    assert "one process lists it, not 2" in capsys.readouterr().err
