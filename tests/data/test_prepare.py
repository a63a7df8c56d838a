"""Preparation: complete or not there, and what ``check`` and a damaged folder say."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_progressive import data as data_room
from megatron_progressive.config import RunConfig
from megatron_progressive.data import TrainingData
from megatron_progressive.data.manifest import fingerprint, read_manifest
from megatron_progressive.data.megatron import indexed_dataset
from tests.data.small_corpora import (
    config_error,
    listing,
    make_config,
    make_documents,
    quiet,
    write_json_lines,
)

TEXTS = make_documents(60)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    corpus = write_json_lines(tmp_path / "corpus/c.jsonl", [*TEXTS, *TEXTS[:20]])
    return make_config(tmp_path, corpus, validation_fraction=0.2)


def documents(folder: Path, split: str) -> list[np.ndarray]:
    dataset = indexed_dataset().IndexedDataset(str(folder / split))
    return [np.array(dataset.get(n)) for n in range(len(dataset))]


def test_round_trip(config: RunConfig) -> None:
    from tokenizers import Tokenizer

    folder = data_room.prepare(config, quiet)
    assert folder == data_room.prepared_folder(config)
    assert folder.parent == Path(config.run.dir) / "data"
    manifest = json.loads((folder / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    assert manifest["vocab_size"] == tokenizer.get_vocab_size() == 300
    texts: dict[str, list[str]] = {}
    for split in ("train", "validation"):
        rows = documents(folder, split)
        assert all(row[-1] == manifest["end_of_document"] for row in rows)
        assert {row.dtype.name for row in rows} == {"uint16"}
        texts[split] = [tokenizer.decode(row[:-1].tolist()) for row in rows]
        content = (folder / f"{split}.bin").read_bytes()
        assert manifest["splits"][split] == {
            "documents": len(rows),
            "tokens": sum(map(len, rows)),
            "text_bytes": sum(len(text.encode()) for text in texts[split]),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        assert manifest["files"][f"{split}.bin"] == len(content)
    assert sorted(texts["train"] + texts["validation"]) == sorted([*TEXTS, *TEXTS[:20]])
    assert not set(texts["train"]) & set(texts["validation"])
    assert texts["validation"]


def test_batches_do_not_change_the_files(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room: Any = sys.modules["megatron_progressive.data.prepared_parts"]
    folder = data_room.prepare(config, quiet)
    monkeypatch.setattr(room, "BATCH_BYTES", 500)
    other = make_config(
        tmp_path, config.data.corpus, validation_fraction=0.2, prepared=tmp_path / "other"
    )
    assert data_room.prepare(other, quiet) == tmp_path / "other"
    for name in listing(folder):
        if (folder / name).is_file():
            assert (folder / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def test_large_vocabulary_takes_wider_tokens(config: RunConfig, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from megatron_progressive.data.tokenizer import train_bpe

    backend: Tokenizer = train_bpe(TEXTS, 300).backend
    backend.add_tokens([f"never{n}" for n in range(70_000)])
    backend.save(str(tmp_path / "tokenizer.json"))
    wide = make_config(
        tmp_path, config.data.corpus, tokenizer=tmp_path / "tokenizer.json", vocab_size=80_000
    )
    folder = data_room.prepare(wide, quiet)
    assert read_manifest(folder).dtype == "int32"
    texts = [backend.decode(row[:-1].tolist()) for row in documents(folder, "train")]
    assert set(texts) < set(TEXTS)


def test_idempotent(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data_room.prepare(config, quiet)
    before = {name: (folder / name).stat().st_mtime_ns for name in listing(folder)}
    stages: list[str] = []
    assert data_room.prepare(config, lambda stage, *_: stages.append(stage)) == folder
    assert {name: (folder / name).stat().st_mtime_ns for name in listing(folder)} == before
    assert not stages
    assert listing(folder.parent) == [folder.name, *(f"{folder.name}/{n}" for n in before)]
    umask = os.umask(0)
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_fingerprint_tells_content_apart(config: RunConfig, tmp_path: Path) -> None:
    def of(**changes: Any) -> str:
        settings = {"validation_fraction": 0.2, **changes}
        return fingerprint(make_config(tmp_path, config.data.corpus, **settings))

    same = fingerprint(config)
    assert of() == same
    assert of(sequence_length=64) == same
    changes = [
        {"vocab_size": 301}, {"text_field": "id"}, {"validation_fraction": 0.1}, {"max_bytes": 99}
    ]  # fmt: skip
    prints = [same, *(of(**change) for change in changes)]
    with open(config.data.corpus, "a") as file:
        file.write('{"text": "more"}\n')
    prints.append(of())
    assert len(set(prints)) == len(prints)


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_progressive import data
from tests.data.small_corpora import make_config
def progress(stage, done, total):
    if done > 2000:
        os.kill(os.getpid(), signal.SIGKILL)
data.prepare(make_config(Path(sys.argv[1]), sys.argv[2], validation_fraction=0.2), progress)
"""


def test_killed_preparation_leaves_nothing_taken_as_finished(
    config: RunConfig, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), config.data.corpus]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == -9, result.stderr
    folder = data_room.prepared_folder(config)
    assert not folder.exists()
    (left,) = folder.parent.iterdir()
    assert left.name == f".{folder.name}.parts"
    with config_error("data.prepared", "does not exist"):
        TrainingData.open(config)
    # what a version before this one, or putting parts together, has left: it could be live
    stale = folder.parent / f".{folder.name}.0123456789ab.tmp"
    stale.mkdir()
    data_room.prepare(config, quiet)
    TrainingData.open(config)
    assert sorted(path.name for path in folder.parent.iterdir()) == [stale.name, folder.name]
    # an hour later it cannot, and the next preparation removes it
    os.utime(stale, (time.time() - 4000,) * 2)
    shutil.rmtree(folder)
    data_room.prepare(config, quiet)
    assert listing(folder.parent)[0] == folder.name


def test_failure_leaves_nothing(config: RunConfig) -> None:
    def interrupted(stage: str, done: int, total: int | None) -> None:
        if done > 2000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data_room.prepare(config, interrupted)
    assert listing(Path(config.run.dir) / "data") == []


def test_two_at_once(config: RunConfig) -> None:
    barrier, results = threading.Barrier(2, timeout=60), []
    met = threading.local()

    def together(stage: str, done: int, total: int | None) -> None:
        if done and not hasattr(met, "yes"):
            met.yes = True
            barrier.wait()

    threads = [
        threading.Thread(target=lambda: results.append(data_room.prepare(config, together)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = data_room.prepared_folder(config)
    assert results == [folder, folder]
    read_manifest(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "c.jsonl", [TEXTS[0]] * 9)
    config = make_config(tmp_path, corpus)
    for act in (data_room.check, lambda c: data_room.prepare(c, quiet)):
        with config_error("data.validation_fraction", "no train document"):
            act(config)


def test_check_counts_tokens_of_a_small_corpus_exactly(config: RunConfig, tmp_path: Path) -> None:
    def with_length(length: int) -> RunConfig:
        return make_config(
            tmp_path, config.data.corpus, sequence_length=length, validation_fraction=0.2
        )

    splits = read_manifest(data_room.prepare(config, quiet)).splits
    tokens = splits["validation"].tokens
    for prepared in (True, False):
        before = listing(tmp_path)
        data_room.check(with_length(tokens - 1))
        with config_error(
            "data.sequence_length", f"got {tokens};", f"at most {tokens - 1}", "validation"
        ):
            data_room.check(with_length(tokens))
        with config_error("data.sequence_length", "train", f"most {splits['train'].tokens - 1}"):
            data_room.check(with_length(splits["train"].tokens))
        assert listing(tmp_path) == before
        if prepared:
            with config_error("data.sequence_length"):
                TrainingData.open(with_length(tokens))
            shutil.rmtree(config.run.dir)


def test_check_of_a_larger_corpus_reads_without_tokenizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room: Any = sys.modules["megatron_progressive.data.prepare"]
    monkeypatch.setattr(room, "train_bpe", None)
    data_room.check(make_config(tmp_path, "stdlib", max_bytes=2_500_000))
    with config_error("data.sequence_length", "got 200000", "validation split of stdlib"):
        data_room.check(
            make_config(tmp_path, "stdlib", max_bytes=2_500_000, sequence_length=200_000)
        )
    assert listing(tmp_path) == []


def test_stdlib(tmp_path: Path) -> None:
    config = make_config(tmp_path, "stdlib", max_bytes=200_000)
    folder = data_room.prepare(config, quiet)
    assert folder.name.startswith("stdlib-")
    manifest = read_manifest(folder)
    assert sum(split.text_bytes for split in manifest.splits.values()) == 200_000
    assert TrainingData.open(config).train_batch(0, 4).shape == (4, 9)


def damage(folder: Path, what: str) -> None:
    manifest = folder / "manifest.json"
    match what:
        case "no manifest.json":
            manifest.unlink()
        case "manifest.json is damaged":
            manifest.write_text(manifest.read_text()[:-30])
        case "of format 0":
            manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 0'))
        case "lacks train.idx":
            (folder / "train.idx").unlink()
        case "validation.bin has 10 bytes":
            os.truncate(folder / "validation.bin", 10)
        case "does not exist":
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    "what",
    [
        "no manifest.json",
        "manifest.json is damaged",
        "of format 0",
        "lacks train.idx",
        "validation.bin has 10 bytes",
        "does not exist",
    ],
)
def test_damaged_folder(config: RunConfig, tmp_path: Path, what: str) -> None:
    folder = data_room.prepare(config, quiet)
    explicit = make_config(tmp_path, "stdlib", prepared=folder)
    data_room.check(explicit)
    damage(folder, what)
    before = listing(tmp_path)
    for act in (data_room.check, TrainingData.open):
        with config_error("data.prepared", str(folder), what):
            act(explicit)
    if what != "does not exist":  # a folder under run.dir is trusted no more than that
        for again in (data_room.check, lambda c: data_room.prepare(c, quiet)):
            with config_error("data.prepared", what):
                again(config)
    assert listing(tmp_path) == before


def test_prepared_for_a_larger_model(config: RunConfig, tmp_path: Path) -> None:
    folder = data_room.prepare(config, quiet)
    small = make_config(tmp_path, "stdlib", prepared=folder, vocab_size=299)
    for act in (data_room.check, TrainingData.open, lambda c: data_room.prepare(c, quiet)):
        with config_error("data.vocab_size", "got 299;", "at least 300"):
            act(small)


def test_run_folder_inside_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with config_error("run.dir", "inside corpus"):
        data_room.check(make_config(tmp_path, tmp_path))
    assert listing(tmp_path) == ["a.txt"]


def test_plain_progress_lines(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    data_room.prepare(config)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[:2] == ["data: training a tokenizer on c", "data: tokenizing c"]
    splits = read_manifest(data_room.prepared_folder(config)).splits
    for name, split in splits.items():
        assert f"{name}: {split.documents} documents, " in lines[2]
        assert f"{split.tokens:,} tokens" in lines[2]
    assert lines[3:] == ["data: read 1 file (1 JSON)"]


def test_what_is_left_out_is_said_after_preparing_and_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_json_lines(tmp_path / "corpus/c.jsonl", TEXTS).parent
    (corpus / "latin.txt").write_bytes("\u00e9".encode("latin-1") * 50)
    (corpus / "d.txt").write_bytes(b"words " * 200 + b"\xff")
    config = make_config(tmp_path, corpus, validation_fraction=0.2)
    data_room.check(config)
    folder = data_room.prepare(config)
    left_out = "left out 1 of 3 files (50 bytes): 1 not UTF-8 (latin.txt; convert it with iconv)"
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "data: read 2 files (1 JSON, 1 plain text)",
        f"data: {left_out}",
        "data: replaced what is not UTF-8 by U+FFFD in 1 document (d.txt)",
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["reading"] == {
        "files_read": {"JSON": 1, "plain text": 1},
        "files_not_reached": 0,
        "left_out": {"not UTF-8": {"files": 1, "bytes": 50, "example": "latin.txt"}},
        "replaced_documents": 1,
        "replaced_example": "d.txt",
    }
    data_room.check(config)
    assert capsys.readouterr().err == f"data: {corpus}: {left_out}\n"


def test_too_little_text_names_what_was_left_out(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "corpus/c.jsonl", TEXTS[:2]).parent
    (corpus / "rest.bin").write_bytes(bytes(range(256)) * 100)
    with config_error("data.sequence_length", "left out 1 of 2 files", "1 binary (rest.bin)"):
        data_room.check(make_config(tmp_path, corpus, sequence_length=5000))


def test_folder_of_an_earlier_version_stays_usable(config: RunConfig, tmp_path: Path) -> None:
    folder = data_room.prepare(config, quiet)
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    del values["reading"]
    path.write_text(json.dumps(values | {"format": 1}))
    explicit = make_config(tmp_path, "stdlib", prepared=folder)
    data_room.check(explicit)
    manifest = TrainingData.open(explicit).manifest
    assert (manifest.format, manifest.reading) == (1, None)
    assert len(manifest.summary()) == 1
    assert data_room.prepare(explicit, quiet) == folder


def test_import_is_light() -> None:
    code = (
        "import sys, megatron_progressive.data\n"
        "heavy = {'torch', 'megatron', 'datasets', 'transformers', 'tokenizers', 'pyarrow'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
