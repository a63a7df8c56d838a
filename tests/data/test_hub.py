"""Streams of the Hugging Face hub that break: opened again, gone on with where they were."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import data as data_room
from megatron_progressive.config import RunConfig
from megatron_progressive.data import hub
from megatron_progressive.data.manifest import read_manifest
from megatron_progressive.data.tokenizer import train_bpe
from megatron_progressive.data.work import Shard
from tests.data.small_corpora import config_error, make_config, make_documents, quiet
from tests.data.test_shards import content

FILES = [make_documents(n, seed=n) for n in (90, 70, 110)]
ROWS = sum(map(len, FILES))


class Breaking:
    """A data set in three data files, as ``datasets`` streams it, whose connection breaks."""

    def __init__(self) -> None:
        self.breaks: set[tuple[int, int]] = set()
        """The rows, as (file, row), before which it breaks, each once."""
        self.read = 0
        """The rows that were read, again or not."""
        self.opened = 0

    def rows(self, files: list[int]) -> Iterator[dict[str, str]]:
        for file in files:
            for row, text in enumerate(FILES[file]):
                if (file, row) in self.breaks:
                    self.breaks.remove((file, row))
                    raise ConnectionResetError("Connection reset by peer")
                self.read += 1
                yield {"text": text}

    def load(self, name: str, *_: Any, **__: Any) -> Any:
        import datasets

        assert name == "someone/texts"
        self.opened += 1
        return datasets.IterableDataset.from_generator(self.rows, gen_kwargs={"files": [0, 1, 2]})


class Stateless:
    """The same as an iterable that cannot say where it is."""

    def __init__(self, breaking: Breaking) -> None:
        self._breaking = breaking

    def __iter__(self) -> Iterator[dict[str, str]]:
        return self._breaking.rows([0, 1, 2])


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Breaking:
    import datasets
    import huggingface_hub

    def unknown(*_: Any) -> None:
        raise OSError("offline")

    breaking = Breaking()
    monkeypatch.setattr(datasets, "load_dataset", breaking.load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unknown)
    monkeypatch.setattr(hub, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(hub, "STATE_ROWS", 7)
    monkeypatch.setattr(sys.modules["megatron_progressive.data.work"], "PART_BYTES", 5000)
    monkeypatch.setattr(sys.modules["megatron_progressive.data.prepared_parts"], "BATCH_BYTES", 900)
    monkeypatch.setattr(sys.modules["megatron_progressive.data.merge"], "WHOLE_BYTES", 5000)
    return breaking


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    train_bpe([text for texts in FILES for text in texts], 300).save(tmp_path / "tokens")
    return make_config(
        tmp_path, "hf:someone/texts", validation_fraction=0.1, tokenizer=tmp_path / "tokens"
    )


@pytest.fixture
def whole(config: RunConfig, breaking: Breaking) -> dict[str, bytes]:
    folder = data_room.prepare(config, quiet)
    assert folder is not None
    made = content(folder)
    counts = read_manifest(folder).splits.values()
    assert sum(split.documents for split in counts) == ROWS
    shutil.rmtree(folder)
    breaking.read = 0
    return made


def test_a_stream_that_breaks_goes_on_where_it_was(
    config: RunConfig, breaking: Breaking, whole: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    breaks = {(0, 0), (0, 50), (1, 3), (1, 69), (2, 40), (2, 41)}
    breaking.breaks = set(breaks)
    folder = data_room.prepare(config, quiet)
    assert folder is not None
    assert content(folder) == whole
    assert not breaking.breaks
    # the state of a generator passes over the rows of its data file, and no others
    assert breaking.read == ROWS + sum(row for _, row in breaks)
    said = capsys.readouterr().err
    assert "hf:someone/texts broke off in data file 1 after row 3" in said
    assert "Connection reset by peer" in said


def test_a_process_that_ends_goes_on_where_it_was(
    config: RunConfig, breaking: Breaking, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a data file, by the parts that are finished."""
    waits = hub.RETRY_SECONDS
    monkeypatch.setattr(hub, "RETRY_SECONDS", ())
    for place in ((2, 100), (2, 80)):
        breaking.breaks = {place}
        with config_error("data.corpus", "hf:someone/texts", "Connection reset by peer"):
            data_room.prepare(config, quiet)
        breaking.read = 0
    monkeypatch.setattr(hub, "RETRY_SECONDS", waits)
    breaking.breaks = set()
    folder = data_room.prepare(config, quiet)
    assert folder is not None
    assert breaking.read == len(FILES[2])
    assert content(folder) == whole


@pytest.mark.parametrize("count", [2, 5])
def test_shards_of_data_files(
    config: RunConfig, breaking: Breaking, whole: dict[str, bytes], count: int
) -> None:
    breaking.breaks = {(1, 5)}
    for number in reversed(range(count)):
        data_room.prepare_shard(config, Shard(number, count))
    assert content(data_room.prepared_folder(config)) == whole


def test_an_iterable_without_states_is_read_again_up_to_there(
    config: RunConfig, breaking: Breaking, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    stateless = Stateless(breaking)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stateless)
    one = data_room.prepare(config, quiet)
    assert one is not None
    made = content(one)
    shutil.rmtree(one)
    breaking.breaks = {(0, 0), (1, 20), (2, 109)}
    again = data_room.prepare(config, quiet)
    assert again is not None
    assert content(again) == made
    for split in ("train", "validation"):  # one unit, of which the first part has all that waited
        counts = [json.loads(files["manifest.json"])["splits"][split] for files in (made, whole)]
        assert counts[0]["documents"] == counts[1]["documents"]


def test_the_tries_come_to_an_end(
    config: RunConfig, breaking: Breaking, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"opened": 0}
    rows = breaking.rows

    def gone(files: list[int]) -> Iterator[dict[str, str]]:
        state["opened"] += 1
        if state["opened"] > 2:
            raise ConnectionResetError("gone for good")
        yield from rows(files)

    monkeypatch.setattr(breaking, "rows", gone)
    with config_error("data.corpus", "gone for good"):
        data_room.prepare(config, quiet)
    assert state["opened"] == 2 + 1 + len(hub.RETRY_SECONDS)
