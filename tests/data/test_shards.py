"""Preparation in units: by any number of shards and workers, killed and restarted, the same bits as
by one unbroken process, and the same tokens as a page of plain code."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_progressive import cli
from megatron_progressive import data as data_room
from megatron_progressive.config import RunConfig, to_yaml
from megatron_progressive.data import TrainingData
from megatron_progressive.data.corpus import open_corpus
from megatron_progressive.data.manifest import read_manifest
from megatron_progressive.data.megatron import indexed_dataset
from megatron_progressive.data.split import content_hash
from megatron_progressive.data.units import plan_units
from megatron_progressive.data.work import Shard
from tests.data.small_corpora import config_error, listing, make_config, make_documents, quiet
from tests.jobs import Jobs

FRACTION = 0.1
KILLS = 10


def small_units() -> None:
    """Make corpora of a few kB as large ones are: of several units, and those of several parts."""
    for module, name, size in (("units", "WHOLE_BYTES", 8000), ("merge", "WHOLE_BYTES", 8000),
                               ("units", "UNIT_BYTES", 6000), ("work", "PART_BYTES", 4000),
                               ("prepared_parts", "BATCH_BYTES", 900)):  # fmt: skip
        setattr(sys.modules[f"megatron_progressive.data.{module}"], name, size)


@pytest.fixture
def units_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("units", "WHOLE_BYTES"), ("merge", "WHOLE_BYTES"),
                         ("units", "UNIT_BYTES"), ("work", "PART_BYTES"),
                         ("prepared_parts", "BATCH_BYTES")):  # fmt: skip
        room = sys.modules[f"megatron_progressive.data.{module}"]
        monkeypatch.setattr(room, name, getattr(room, name))
    small_units()


def write_corpus(folder: Path) -> Path:
    """Files that are units together, that are cut into several, and that have several parts."""
    folder.mkdir()
    texts = make_documents(300)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.txt").write_bytes(b"\xff" + texts[1].encode())
    (folder / "c.jsonl").write_text("".join(lines[2:150]))
    with gzip.open(folder / "d.jsonl.gz", "wt") as file:
        file.write("".join(lines[150:260]))
    (folder / "e.bin").write_bytes(bytes(range(256)) * 8)
    for number, text in enumerate(texts[260:]):
        (folder / f"f{number:02d}.md").write_text(text)
    return folder


@pytest.fixture
def config(tmp_path: Path, units_are_small: None) -> RunConfig:
    return make_config(tmp_path, write_corpus(tmp_path / "c"), validation_fraction=FRACTION)


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in listing(folder)
            if (folder / name).is_file()}  # fmt: skip


@pytest.fixture
def whole(config: RunConfig) -> dict[str, bytes]:
    """What one unbroken process makes."""
    folder = data_room.prepare(config, quiet)
    assert folder is not None
    made = content(folder)
    shutil.rmtree(folder)
    return made


def as_files(made: dict[str, bytes], split: str) -> bytes:
    return b"".join(made[name] for name in sorted(made) if name.startswith(split)
                    and name.endswith(".bin"))  # fmt: skip


def test_units_and_parts_have_the_tokens_of_plain_code(
    config: RunConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    corpus = open_corpus(config.data)
    units = plan_units(corpus)
    assert len(units) > 7
    spans = [unit for unit in units if unit.end is not None]
    assert [unit.files[0].name for unit in spans] == ["c.jsonl"] * len(spans)
    manifest = json.loads(whole["manifest.json"])
    assert manifest["format"] == 3
    assert len(manifest["parts"]["train"]) > len(units)  # d.jsonl.gz has several
    (tmp_path / "tokenizer.json").write_bytes(whole["tokenizer/tokenizer.json"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    stream: dict[str, list[int]] = {"train": [], "validation": []}
    counts = dict.fromkeys(stream, 0)
    texts = list(corpus.documents())
    assert len(texts) == 300
    for text in texts:
        split = "validation" if content_hash(text) < FRACTION * 2**64 else "train"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        stream[split] += [*ids, manifest["end_of_document"]]
        counts[split] += 1
    for split, tokens in stream.items():
        got = np.frombuffer(as_files(whole, split), np.uint16)
        assert got.tolist() == tokens, split
        assert manifest["splits"][split]["documents"] == counts[split]
        assert manifest["splits"][split]["tokens"] == len(tokens)
    assert manifest["reading"] == {
        "files_read": {"plain text": 42, "JSON": 2},
        "files_not_reached": 0,
        "left_out": {"binary": {"files": 1, "bytes": 2048, "example": "e.bin"}},
        "replaced_documents": 1,
        "replaced_example": "b.txt",
    }


def test_training_reads_parts_as_one_file(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same documents in the same order as from the single file of a smaller corpus."""
    data_room.prepare(config, quiet)
    in_parts = TrainingData.open(config)
    assert in_parts.manifest.parts
    merging = sys.modules["megatron_progressive.data.merge"]
    monkeypatch.setattr(merging, "WHOLE_BYTES", 10**9)
    other = make_config(tmp_path, config.data.corpus, validation_fraction=FRACTION,
                        prepared=tmp_path / "one")  # fmt: skip
    one = data_room.prepare(other, quiet)
    assert one is not None
    assert read_manifest(one).parts is None
    in_one = TrainingData.open(other)
    assert len(in_one.train) == len(in_parts.train) > 1000
    assert (in_one.train_batch(0, 2000) == in_parts.train_batch(0, 2000)).all()
    count = in_one.validation_samples
    assert (in_one.validation_batch(0, count) == in_parts.validation_batch(0, count)).all()
    # each part is an indexed dataset of Megatron's
    folder, lengths = data_room.prepared_folder(config), []
    for part in in_parts.manifest.parts["train"]:
        dataset = indexed_dataset().IndexedDataset(str(folder / part.name))
        assert len(dataset) == len(dataset.document_indices) - 1 == part.documents
        lengths += dataset.sequence_lengths.tolist()
    dataset = indexed_dataset().IndexedDataset(str(one / "train"))
    assert lengths == dataset.sequence_lengths.tolist()


@pytest.mark.parametrize("count", [2, 7])
def test_shards_give_the_bits_of_one_process(
    config: RunConfig, whole: dict[str, bytes], count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data_room.prepared_folder(config)
    order = random.Random(count).sample(range(count), count)
    for number in order[:-1]:
        assert data_room.prepare_shard(config, Shard(number, count)) is None
        assert f"shard {number}/{count} is finished; missing yet: shard " in capsys.readouterr().err
        assert not folder.exists()
    assert data_room.prepare_shard(config, Shard(order[-1], count)) == folder
    assert content(folder) == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert data_room.prepare_shard(config, Shard(0, count)) == folder


def test_workers_give_the_bits_of_one_process(
    config: RunConfig, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data_room.prepare(config, quiet, workers=2)
    assert folder is not None
    assert content(folder) == whole


def killed_after(batches: int) -> None:
    """Kill this process when it has tokenized so many batches, in the midst of a part."""
    small_units()
    room: Any = sys.modules["megatron_progressive.data.prepared_parts"]
    add, left = room._SplitFile.add, [batches]

    def adding(*arguments: Any) -> None:
        add(*arguments)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    room._SplitFile.add = adding


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.close()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_killed_at_random_and_restarted(
    config: RunConfig, whole: dict[str, bytes], tmp_path: Path, jobs: Jobs, count: int
) -> None:
    folder = data_room.prepared_folder(config)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    rng = random.Random(count)
    kills = 0
    while not folder.exists():
        words = ["data", "prepare", str(tmp_path / "run.yaml")]
        if count > 1:
            words += ["--shard", f"{rng.randrange(count)}/{count}"]
        batches = rng.randrange(1, 20) if kills < KILLS else 0
        job = jobs.run(1, tmp_path, words, ("tests.data.test_shards", "killed_after", (batches,)))
        assert job.codes[0] in (0, -signal.SIGKILL), job.output
        kills += job.codes[0] < 0
    assert kills == KILLS
    assert content(folder) == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_is_finished_is_not_read_again(
    config: RunConfig, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data_room.prepare_shard(config, Shard(1, 2))
    room: Any = sys.modules["megatron_progressive.data.corpus"]
    opened: list[tuple[str, int]] = []
    open_stream = room.open_stream

    def opening(path: Path, begin: int = 0, end: int | None = None) -> Any:
        opened.append((path.name, begin))
        return open_stream(path, begin, end)

    monkeypatch.setattr(room, "open_stream", opening)
    folder = data_room.prepare(config, quiet)
    assert folder is not None
    units = plan_units(open_corpus(config.data))
    expected = [(path.name, unit.begin) for unit in units[::2] for path in unit.files]
    assert opened == expected
    assert content(folder) == whole


@pytest.mark.parametrize("most", [9000, 20_000, 30_000])
def test_a_limit_cuts_at_the_same_byte_whoever_prepares(
    config: RunConfig, tmp_path: Path, most: int
) -> None:
    def limited(name: str) -> RunConfig:
        return make_config(tmp_path, config.data.corpus, validation_fraction=FRACTION,
                           max_bytes=most, prepared=tmp_path / name)  # fmt: skip

    one = data_room.prepare(limited("one"), quiet)
    assert one is not None
    counts = read_manifest(one).splits.values()
    assert sum(split.text_bytes for split in counts) == most
    for number in (2, 1, 0):
        data_room.prepare_shard(limited("three"), Shard(number, 3))
    assert content(tmp_path / "three") == content(one)
    reading = read_manifest(one).reading
    assert reading is not None
    assert reading.files_not_reached > 0


def test_where_no_hash_is_low_enough_the_lowest_is_held_out(
    config: RunConfig, tmp_path: Path
) -> None:
    tiny = make_config(tmp_path, config.data.corpus, validation_fraction=0.0001)
    one = data_room.prepare(tiny, quiet)
    assert one is not None
    texts = list(open_corpus(config.data).documents())
    lowest = min(texts, key=content_hash)
    manifest = read_manifest(one)
    assert manifest.splits["validation"].documents == 1
    assert manifest.splits["validation"].text_bytes == len(lowest.encode())
    assert manifest.splits["train"].documents == len(texts) - 1
    made = content(one)
    shutil.rmtree(one)
    for number in (0, 1):
        data_room.prepare_shard(tiny, Shard(number, 2))
    assert content(one) == made


def refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = listing(tmp_path)
    capsys.readouterr()
    assert cli.main(["data", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert listing(tmp_path) == before
    return line


def test_bad_shards(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    for word in ("2/2", "9/2", "0/0", "a/2", "1", "-1/2", "1/2/3", ""):
        line = refused(["prepare", str(file), f"--shard={word}"], tmp_path, capsys)
        assert f"--shard: got {word!r}; accepted: I/N" in line
    line = refused(["merge", str(file)], tmp_path, capsys)
    assert "--shard: got none of" in line
    for number in (0, 3):
        assert cli.main(["data", "prepare", str(file), "--shard", f"{number}/5"]) == 0
    line = refused(["merge", str(file)], tmp_path, capsys)
    assert "without shard 1/5, 2/5, 4/5; accepted: all shards finished" in line
    for change, name in (("data.validation_fraction=0.2", "data.validation_fraction"),
                         ("data.max_bytes=30000", "data.max_bytes"),
                         ("data.vocab_size=290", "data.tokenizer"),
                         ("data.validation_near=true", "data.validation_near")):  # fmt: skip
        for words in (
            ["prepare", str(file), "--shard", "1/5", change],
            ["merge", str(file), change],
        ):
            line = refused(words, tmp_path, capsys)
            assert f"parts of another configuration ({name})" in line
    explicit = make_config(tmp_path, config.data.corpus, prepared=tmp_path / "p", vocab_size=290)
    other = make_config(tmp_path, config.data.corpus, prepared=tmp_path / "p", vocab_size=280)
    data_room.prepare_shard(explicit, Shard(0, 2))
    with config_error("data.prepared", "another configuration (data.tokenizer)"):
        data_room.prepare_shard(other, Shard(1, 2))
    for number in (1, 2, 4):
        assert cli.main(["data", "prepare", str(file), "--shard", f"{number}/5"]) == 0
    assert cli.main(["data", "merge", str(file)]) == 0


def test_a_worker_that_is_killed_ends_it_with_a_word(
    config: RunConfig, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    room: Any = sys.modules["megatron_progressive.data.workers"]
    monkeypatch.setattr(room, "_work", dies)
    with pytest.raises(ChildProcessError, match=r"signal 9.*goes on from what is finished"):
        data_room.prepare(config, quiet, workers=1)


def dies(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_damaged_file_is_refused_and_what_is_finished_stays(
    tmp_path: Path, units_are_small: None
) -> None:
    corpus = write_corpus(tmp_path / "c")
    tokens = data_room.prepare(make_config(tmp_path, corpus, max_bytes=5000), quiet)
    assert tokens is not None
    lines = (corpus / "c.jsonl").read_bytes().splitlines(keepends=True)
    (corpus / "c.jsonl").write_bytes(b"".join([*lines[:-1], b"no JSON\n"]))
    config = make_config(tmp_path, corpus, tokenizer=tokens / "tokenizer")
    with config_error("data.corpus", "c.jsonl", "after byte", "not JSON"):
        data_room.prepare(config, quiet)
    (left,) = (tmp_path / "runs/data").glob(".*")
    assert left.name.endswith(".parts")
    assert [path.name for path in sorted((left / "units").iterdir())][:2] == ["000000", "000001"]
