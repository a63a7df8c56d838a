"""What a run is trained on: known by content, kept while it goes on, and never another one."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import config as configuration
from megatron_progressive import data as data_room
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data import Begun, DataIdentity, as_settled, settle
from megatron_progressive.data.corpus import open_corpus
from megatron_progressive.data.identity import image_identity, prepared_identity, read_identity
from megatron_progressive.data.manifest import read_manifest
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
    corpus = write_json_lines(tmp_path / "c.jsonl", TEXTS)
    return make_config(tmp_path, corpus, validation_fraction=0.2)


def begun(data: DataIdentity | None, at: float = 0.0) -> Begun:
    return Begun("runs/a", "a new run.name", data, at)


def extend(config: RunConfig, text: str = "other words") -> None:
    with open(config.data.corpus, "a") as file:
        file.write(json.dumps({"text": text}) + "\n")


def test_the_identity_is_of_text_split_and_tokenizer(config: RunConfig, tmp_path: Path) -> None:
    def of(name: str, texts: list[str] = TEXTS, **changes: Any) -> str:
        corpus = write_json_lines(tmp_path / name / "other.jsonl", texts)
        settings = {"validation_fraction": 0.2, **changes}
        found, notes = settle(make_config(tmp_path / name, corpus, **settings), None, quiet)
        assert notes == []
        return found.fingerprint

    same, _ = settle(config, None, quiet)
    assert len(same.fingerprint) == 40
    assert of("elsewhere") == same.fingerprint
    others = [
        of("text", [*TEXTS, "more"]),
        of("split", validation_fraction=0.5),
        of("vocabulary", vocab_size=301),
        of("part", max_bytes=2000),
    ]
    assert len({same.fingerprint, *others}) == 5
    # the tokenizer counts by its content, not by how its file is written
    folder = Path(same.prepared or "")
    assert folder == data_room.prepared_folder(config).resolve()
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content))
    assert prepared_identity(folder) == same
    file.write_text(json.dumps({**content, "pre_tokenizer": None}))
    assert prepared_identity(folder).fingerprint != same.fingerprint
    file.unlink()
    with config_error("data.prepared", "tokenizer.json cannot be read"):
        prepared_identity(folder)


def test_a_touched_corpus_has_the_same_identity(config: RunConfig) -> None:
    first, _ = settle(config, None, quiet)
    os.utime(config.data.corpus, (1, 1))
    again, _ = settle(config, None, quiet)
    assert again.fingerprint == first.fingerprint
    assert again.prepared != first.prepared


def test_what_began_goes_on_with_what_it_began_with(config: RunConfig, tmp_path: Path) -> None:
    first, _ = settle(config, None, quiet)
    assert settle(config, begun(first), quiet) == (first, [])
    extend(config)
    found, (note,) = settle(config, begun(first), quiet)
    assert found == first
    for part in (config.data.corpus, "has changed since runs/a began", str(first.prepared)):
        assert part in note
    assert data_room.changed_since(config, first)
    assert len(list((tmp_path / "runs" / "data").iterdir())) == 1  # nothing prepared for it
    tokens = data_room.TrainingData.open(as_settled(config, first)).manifest
    assert tokens == read_manifest(Path(first.prepared or ""))
    # a fresh run takes what is there
    fresh, notes = settle(config, None, quiet)
    assert (fresh.fingerprint != first.fingerprint, notes) == (True, [])
    # the corpus itself is not needed
    Path(config.data.corpus).unlink()
    assert settle(config, begun(first), quiet) == (first, [])
    assert not data_room.changed_since(config, first)


def test_runs_that_were_moved_go_on_with_what_is_beside_them(
    config: RunConfig, tmp_path: Path
) -> None:
    first, _ = settle(config, None, quiet)
    extend(config)
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = replace(config, run=replace(config.run, dir=str(tmp_path / "moved")))
    found, _ = settle(moved, begun(first), quiet)
    assert found.fingerprint == first.fingerprint
    assert Path(found.prepared or "").parent == tmp_path / "moved" / "data"


def test_what_is_gone_can_be_prepared_again_from_the_same_text_only(config: RunConfig) -> None:
    first, _ = settle(config, None, quiet)
    shutil.rmtree(first.prepared or "")
    assert settle(config, begun(first), quiet) == (first, [])
    shutil.rmtree(first.prepared or "")
    extend(config)
    with config_error("data.corpus", "not what runs/a was trained on", f"{first.prepared} (which",
                      "a new run.name"):  # fmt: skip
        settle(config, begun(first), quiet)


def test_another_prepared_corpus_is_refused(config: RunConfig, tmp_path: Path) -> None:
    first, _ = settle(config, None, quiet)
    same = tmp_path / "same"
    shutil.copytree(first.prepared or "", same)
    named = replace(config, data=replace(config.data, prepared=str(same)))
    found, _ = settle(named, begun(first), quiet)
    assert found.prepared == str(same)
    extend(config)
    other, _ = settle(config, None, quiet)
    named = replace(config, data=replace(config.data, prepared=other.prepared))
    with config_error("data.prepared", str(other.prepared), f"data.prepared={first.prepared}"):
        settle(named, begun(first), quiet)
    # under one name, made anew
    shutil.rmtree(same)
    shutil.copytree(other.prepared or "", same)
    named = replace(config, data=replace(config.data, prepared=str(same)))
    with config_error("data.prepared", str(same), f"data.prepared={first.prepared}"):
        settle(named, begun(first), quiet)


def test_runs_of_before_this_was_recorded(config: RunConfig) -> None:
    """What was prepared at their time is taken; where that was something else, they are refused."""
    first, _ = settle(config, None, quiet)
    now = time.time() + 1
    found, (note,) = settle(config, begun(None, now), quiet)
    assert found == first
    assert "runs/a was trained on before was not recorded" in note
    os.utime(config.data.corpus, (1, 1))  # prepared anew, to the same content
    for path in (Path(first.prepared or "") / "manifest.json",):
        os.utime(path, (now - 100, now - 100))
    again, _ = settle(config, begun(None, now - 50), quiet)
    assert again.fingerprint == first.fingerprint
    extend(config)
    for _ in range(2):  # what was prepared for the first try does not count for the second
        with config_error("data.corpus", f"data.prepared={first.prepared}", "a new run.name"):
            settle(config, begun(None, now - 50), quiet)
    named = replace(config, data=replace(config.data, prepared=first.prepared))
    assert settle(named, begun(None, now - 50), quiet)[0] == first


def test_runs_of_a_version_that_prepared_otherwise_go_on_with_that(config: RunConfig) -> None:
    first, _ = settle(config, None, quiet)
    folder = Path(first.prepared or "")
    before = folder.with_name(f"{folder.name[:-10]}0123456789")  # of another fingerprint
    folder.rename(before)
    values = json.loads((before / "manifest.json").read_text())
    (before / "manifest.json").write_text(json.dumps({**values, "format": 1}))
    now = time.time()
    os.utime(before / "manifest.json", (now - 100, now - 100))
    found, (note,) = settle(config, begun(None, now - 50), quiet)
    assert Path(found.prepared or "") == before.resolve()
    assert "the only one that was prepared then" in note
    assert not folder.exists()  # nothing was prepared anew
    copied = before.with_name(f"{before.name[:-1]}0")
    shutil.copytree(before, copied)  # two: nobody knows which
    extend(config)
    with config_error("data.corpus", "not prepared as it was", "data.prepared=", "a new run.name"):
        settle(config, begun(None, now - 50), quiet)


def test_stdlib_is_known_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two interpreters with the same sources have the same corpus; times of files do not count."""

    def identity(name: str, text: str, stamp: int) -> list[Any]:
        folder = tmp_path / name
        (folder / "json").mkdir(parents=True)
        (folder / "json" / "decoder.py").write_text(text)
        os.utime(folder / "json" / "decoder.py", (stamp, stamp))
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
        return open_corpus(configuration.DataSection()).identity()

    first = identity("3.12.1", "x = 1", 5)
    assert first[0] == "stdlib"
    assert identity("3.12.2", "x = 1", 6) == first
    assert identity("3.12.3", "x = 2", 5) != first


def test_the_revision_of_a_hub_corpus_is_pinned_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    read: list[str | None] = []

    class Info:
        sha = "a" * 40

    def load(name: str, *_: Any, revision: str | None = None, **__: Any) -> list[dict[str, str]]:
        assert name == "someone/texts"
        read.append(revision)
        return [{"text": text} for text in TEXTS]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: Info())
    monkeypatch.setattr(datasets, "load_dataset", load)
    config = make_config(tmp_path, "hf:someone/texts", validation_fraction=0.2)
    folder = data_room.prepare(config, quiet)
    assert read_manifest(folder).revision == "a" * 40
    assert read == ["a" * 40] * 3  # for its files, for the tokenizer, and for its tokens

    def offline(*_: Any) -> Info:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    shutil.rmtree(folder)
    assert read_manifest(data_room.prepare(config, quiet)).revision is None


def test_the_revision_of_a_hub_tokenizer_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    import transformers

    from megatron_progressive.data.tokenizer import train_bpe

    class Loaded:
        backend_tokenizer = train_bpe(TEXTS, 300).backend

        def save_pretrained(self, folder: str) -> None:
            self.backend_tokenizer.save(f"{folder}/tokenizer.json")

    cached = tmp_path / "snapshots" / ("b" * 40) / "tokenizer.json"
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_: Loaded())
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(cached))
    corpus = write_json_lines(tmp_path / "c.jsonl", TEXTS)
    config = make_config(tmp_path, corpus, tokenizer="someone/tokens", validation_fraction=0.2)
    assert read_manifest(data_room.prepare(config, quiet)).tokenizer_revision == "b" * 40


def pictures(folder: Path) -> RunConfig:
    from PIL import Image

    for split, count in (("train", 3), ("val", 1)):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (8, 8), (n, 0, 0)).save(folder / split / label / f"{n}.bmp")
    return configuration.from_dict(
        {"model": {"family": "resnet"},
         "data": {"corpus": str(folder), "num_classes": 2, "image_size": 8}}
    )  # fmt: skip


def test_pictures_that_change_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    config = pictures(tmp_path / "pictures")
    first, _ = settle(config)
    assert (first.prepared, first.tokenizer) == (None, None)
    for path in (tmp_path / "pictures").rglob("*.bmp"):
        os.utime(path, (1, 1))
    assert settle(config, begun(first)) == (first, [])
    changed = tmp_path / "pictures" / "train" / "a" / "0.bmp"
    Image.new("RGB", (8, 8), (9, 9, 9)).save(changed)  # as large as before
    with config_error("data.corpus", "whose pictures have changed", "a new run.name"):
        settle(config, begun(first))
    monkeypatch.setattr("megatron_progressive.data.identity.CONTENT_BYTES", 0)
    by_size = image_identity(config, 2)
    assert by_size == image_identity(config, 2)
    changed.rename(changed.with_name("9.bmp"))
    assert image_identity(config, 2) != by_size
    shapes = replace(config, data=replace(config.data, corpus="shapes", num_classes=10))
    assert settle(shapes)[0] == settle(shapes)[0] != first


def test_an_identity_that_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    assert read_identity(file) is None
    for text in ("", "[]", '{"fingerprint": 3, "corpus": "a"}', '{"fingerprint": "a"}', "\xff"):
        file.write_text(text)
        assert read_identity(file) is None
    identity = DataIdentity("a", "b", None, None)
    file.write_text(json.dumps({**identity.to_values(), "of_a_later_version": 1}))
    assert read_identity(file) == identity


def test_a_folder_that_another_host_makes_is_waited_for(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = settle(config, None, quiet)
    data_room.wait_until_seen(found)
    monkeypatch.setattr("megatron_progressive.data.settling.SHARED_SECONDS", 0.2)
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.dir: .*gone.* all hosts of the job share"):
        data_room.wait_until_seen(replace(found, prepared=str(tmp_path / "gone")))
    assert listing(tmp_path) == before
