"""Mixtures: which part each draw is from, and what a run on several corpora is trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets import helpers_cpp

from megatron_progressive import config as configuration
from megatron_progressive import data as data_room
from megatron_progressive.config import RunConfig
from megatron_progressive.data import Begun, DataIdentity, as_settled, settle
from megatron_progressive.data.mixture import LONGEST_PERIOD, Blend, whole_weights
from megatron_progressive.data.samples import TrainingData
from megatron_progressive.grid.data import data_key
from megatron_progressive.grid.fingerprint import fingerprint
from tests.data.small_corpora import config_error, make_documents, quiet, write_json_lines

DRAWS = 10_000


def deviations(parts: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """After each draw, how many draws each part is off its share: [draws, parts]."""
    shares = np.array(weights) / sum(weights)
    drawn = np.cumsum(parts[:, None] == np.arange(len(weights)), axis=0)
    return drawn - shares * np.arange(1, len(parts) + 1)[:, None]


@pytest.mark.parametrize(
    "weights",
    [[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3], [1234567, 890123, 456], [1, 1], [5, 4, 3, 2, 1, 0.5],
     [0.9, *[0.005] * 20], [3]],
)  # fmt: skip
def test_every_prefix_is_in_proportion(weights: list[float]) -> None:
    numbers = np.arange(DRAWS, dtype=np.int64)
    parts, draws = Blend(weights, [None] * len(weights)).locate(numbers)
    assert np.abs(deviations(parts, weights)).max() < 1
    for part in range(len(weights)):  # each part's draws are numbered without a gap
        assert draws[parts == part].tolist() == list(range(np.count_nonzero(parts == part)))
    # Megatron-core's own blend has the same proportions, less closely
    theirs, unused = np.zeros(DRAWS, np.int16), np.zeros(DRAWS, np.int64)
    normal = np.array(weights, dtype=np.float64) / sum(weights)
    helpers_cpp.build_blending_indices(theirs, unused, normal, len(weights), DRAWS, False)
    apart = np.abs(deviations(parts, weights) - deviations(theirs, weights)).max()
    assert apart <= 1 + np.abs(deviations(theirs, weights)).max()
    # far away, and in any order, a draw is what it is
    far = numbers + 10**12
    some, of_part = Blend(weights, [None] * len(weights)).locate(far[::-1])
    whole, of_whole = Blend(weights, [None] * len(weights)).locate(far)
    assert (some[::-1] == whole).all()
    assert (of_part[::-1] == of_whole).all()


def test_weights_are_whole_numbers_in_proportion() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == whole_weights([70, 20, 10]) == [7, 2, 1]
    assert whole_weights([2, 2]) == [1, 1]
    odd = whole_weights([1 / 7, 0.123456789, 0.5])
    assert sum(odd) == LONGEST_PERIOD
    assert odd[2] / sum(odd) == pytest.approx(0.5 / (1 / 7 + 0.123456789 + 0.5), abs=1e-5)


def test_a_part_that_is_used_up_leaves_its_share_to_the_others() -> None:
    blend = Blend([0.5, 0.3, 0.2], [None, None, 100])
    parts, draws = blend.locate(np.arange(DRAWS, dtype=np.int64))
    assert blend.total is None
    assert np.count_nonzero(parts == 2) == 100
    end = blend.used_up[2]
    assert parts[:end].tolist().count(2) == 100
    assert Blend([0.5, 0.3, 0.2], [None] * 3).locate(np.array([end]))[0].tolist() == [2]
    assert np.abs(deviations(parts[:end], [0.5, 0.3, 0.2])).max() < 1
    assert np.abs(deviations(parts[end:], [0.5, 0.3])).max() < 1
    for part in range(3):
        assert draws[parts == part].tolist() == list(range(np.count_nonzero(parts == part)))
    assert blend.drawn(DRAWS) == np.bincount(parts).tolist()
    whole = Blend([0.5, 0.3, 0.2], [40, 10, 0])
    assert (whole.total, whole.used_up[2]) == (50, 0)
    with pytest.raises(IndexError, match="draw 50 of 50"):
        whole.locate(np.array([50]))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for seed, (name, count) in enumerate({"a": 120, "b": 60, "c": 30, "other": 20}.items()):
        write_json_lines(folder / f"{name}.jsonl", make_documents(count, seed + 1))
    return folder


def mixed(texts: Path, runs: Path, weights: str = "7 2 1", **changes: Any) -> RunConfig:
    """A run on the parts a, b and c; ``changes`` are of the section ``data``, or of part c."""
    own = {key: changes.pop(key) for key in ("epochs_at_most", "prepared") if key in changes}
    parts: list[dict[str, Any]] = [
        {"corpus": str(texts / f"{name}.jsonl"), "weight": float(weight)}
        for name, weight in zip("abc", weights.split(), strict=False)
    ]
    parts[-1] |= own
    return configuration.from_dict(
        {
            "model": {"family": "gpt2"},
            "run": {"dir": str(runs)},
            "train": {"steps": 50, "global_batch": 20},
            "data": {"mix": parts, "vocab_size": 300, "sequence_length": 8,
                     "validation_fraction": 0.2} | changes,
        }
    )  # fmt: skip


def test_a_run_draws_from_each_part_what_it_would_alone(texts: Path, tmp_path: Path) -> None:
    config = mixed(texts, tmp_path, epochs_at_most=0.25, sequence_length=32)
    found, notes = settle(config, None, quiet)
    settled = as_settled(config, found)
    data = data_room.open_data(settled)
    assert isinstance(data, data_room.MixedData)
    assert notes == []
    size = len(data.parts[2].train)
    most = size // 4
    where: dict[tuple[int, ...], tuple[int, int]] = {}
    for part, one in enumerate(data.parts):
        assert isinstance(one, TrainingData)
        rows = one.train.get(range(len(one.train))).tolist()
        where |= {tuple(row): (part, n) for n, row in enumerate(rows)}
    drawn = [where[tuple(row)] for row in data.train_batch(0, 1000).tolist()]
    parts = np.array([part for part, _ in drawn])
    end = data.blend.used_up[2]
    assert end < 1000
    assert np.abs(deviations(parts[:end], [7, 2, 1])).max() < 1
    assert np.abs(deviations(parts[end:], [7, 2])).max() < 1
    of_c = [n for part, n in drawn if part == 2]
    assert len(of_c) == len(set(of_c)) == most  # in a quarter of an epoch nothing comes twice
    # the first part has the order that it has alone
    alone = data.parts[0].train_batch(0, 50).tolist()
    assert [list(row) for row, (part, _) in zip(
        map(tuple, data.train_batch(0, 1000).tolist()), drawn, strict=True) if part == 0
    ][:50] == alone  # fmt: skip
    # batches of any size, in any order, are the same draws
    again = [data.train_batch(first, 7) for first in (993, 0, 500)]
    whole = data.train_batch(0, 1000)
    for first, batch in zip((993, 0, 500), again, strict=True):
        assert batch.tolist() == whole[first : first + 7].tolist()
    # validation: held-out text in the same proportions, nothing twice
    held = {
        tuple(row): part
        for part, one in enumerate(data.parts)
        for row in one.validation.get(range(len(one.validation))).tolist()
    }
    count = data.validation_samples
    rows = [tuple(row) for row in data.validation_batch(0, count).tolist()]
    assert len(set(rows)) == count
    assert np.abs(deviations(np.array([held[row] for row in rows]), [7, 2, 1])).max() < 1
    # and the words for the user
    used, *others = data_room.mix_warnings(config, data_room.tokens_of(found))
    assert f"c.jsonl is used up (epochs_at_most) in step {end // 20 + 1}" in used
    assert others == []
    longer = replace(config, train=replace(config.train, steps=500))
    warnings = data_room.mix_warnings(longer, data_room.tokens_of(found))
    assert ["past 4 epochs" in text for text in warnings] == [True, True, False]
    draws = data_room.part_draws(longer, data_room.tokens_of(found), 10_000)
    assert [one.tokens for one in draws] == [32 * n for n in data.blend.drawn(10_000)]


def test_weights_share_the_tokenizer_and_the_prepared_parts(texts: Path, tmp_path: Path) -> None:
    first, _ = settle(mixed(texts, tmp_path), None, quiet)
    second, _ = settle(mixed(texts, tmp_path, "1 1 1"), None, quiet)
    limited, _ = settle(mixed(texts, tmp_path, epochs_at_most=2), None, quiet)
    assert [one.prepared for one in first.parts] == [one.prepared for one in second.parts]
    assert len({first.fingerprint, second.fingerprint, limited.fingerprint}) == 3
    assert len({one.tokenizer for one in (*first.parts, *second.parts)}) == 1
    same, _ = settle(mixed(texts, tmp_path, "70 20 10"), None, quiet)
    assert same.fingerprint == first.fingerprint
    folders = sorted(path.name.split("-")[0] for path in (tmp_path / "data").iterdir())
    assert folders == ["a", "b", "c", "tokenizer"]
    # a tokenizer that is named serves a single corpus and a mixture alike
    named = {"tokenizer": str(first.tokenizer_folder)}
    third, _ = settle(mixed(texts, tmp_path, **named), None, quiet)
    assert third == first
    # what is written in JSON is what is read
    assert DataIdentity.from_values(json.loads(json.dumps(first.to_values()))) == first


def test_what_began_on_a_mixture_goes_on_with_it(texts: Path, tmp_path: Path) -> None:
    own = tmp_path / "texts"
    shutil.copytree(texts, own)
    config = mixed(own, tmp_path / "runs")
    first, _ = settle(config, None, quiet)
    begun = Begun("runs/a", "a new run.name", first)
    assert settle(config, begun, quiet) == (first, [])
    assert not data_room.changed_since(config, first)
    with open(own / "b.jsonl", "a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    assert data_room.changed_since(config, first)
    found, (note,) = settle(config, begun, quiet)
    assert found == first
    assert "b.jsonl has changed since runs/a began" in note
    # one part is gone: it can be made again from the same text only
    for name, words in (("c", ()), ("b", ("data.mix[1].corpus: ", "data.mix.1.prepared="))):
        shutil.rmtree(first.parts["abc".index(name)].prepared or "")
        if not words:
            assert settle(config, begun, quiet)[0] == first
            continue
        with config_error("data.mix[1].corpus", *words, "not what runs/a was trained on"):
            settle(config, begun, quiet)
    with config_error("data.mix", "50 %", "70 %", "a new run.name"):
        settle(mixed(texts, tmp_path / "runs", "5 3 2"), Begun("runs/a", "a new run.name", first))
    with config_error("data.mix", "trained on mix of", "a new run.name"):
        settle(mixed(texts, tmp_path / "runs", "5 3"), begun, quiet)
    alone = replace(config, data=replace(config.data, mix=None, corpus=str(own / "a.jsonl")))
    with config_error("data.corpus", "trained on a mix of", "a new run.name"):
        settle(alone, begun, quiet)


def test_cells_know_their_mixture(texts: Path, tmp_path: Path) -> None:
    one, other = mixed(texts, tmp_path), mixed(texts, tmp_path, "5 3 2")
    found, _ = settle(one, None, quiet)
    settled = as_settled(one, found)
    assert fingerprint(settled, found) == fingerprint(one, found)  # places do not count
    assert data_key(settled) == data_key(one)
    assert fingerprint(one) != fingerprint(other)
    assert data_key(one) != data_key(other)
    # keys that are not given change nothing: fingerprints of a version without them
    plain = configuration.from_dict({"model": {"family": "gpt2"}})
    assert fingerprint(plain) == "dd0dae7b3c7e"
    assert data_key(plain) == "481b263788ba"


def test_bad_mixtures_are_refused(texts: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    def refused(field: str, *parts: str, **changes: Any) -> None:
        with config_error(field, *parts):
            settle(mixed(texts, runs, **changes), None, quiet)
        assert not runs.exists()

    refused("data.mix[2].weight", "1e-06", "1e-05", weights="7 2 0.000001")
    refused("data.vocab_size", "got 200", "257", vocab_size=200)
    gone = str(texts / "gone")
    with config_error("data.mix[1].corpus", "does not exist"):
        config = mixed(texts, runs)
        mix = [config.data.mix[0], replace(config.data.mix[1], corpus=gone)]  # type: ignore[index]
        settle(replace(config, data=replace(config.data, mix=mix)), None, quiet)
    refused("data.validation.v", "which the run is trained on", "split: validation",
            validation={"v": str(texts / "b.jsonl")})  # fmt: skip
    refused("data.validation.v.corpus", "does not exist", validation={"v": gone})
    # a part with another tokenizer
    alone = configuration.from_dict(
        {"model": {"family": "gpt2"}, "run": {"dir": str(tmp_path / "alone")},
         "data": {"corpus": str(texts / "c.jsonl"), "vocab_size": 280, "sequence_length": 8,
                  "validation_fraction": 0.2}}
    )  # fmt: skip
    folder = data_room.prepare(alone, quiet)
    mix = mixed(texts, tmp_path / "first")
    found, _ = settle(mix, None, quiet)
    settled = as_settled(mix, found).data.mix
    assert settled is not None
    others = [*settled[:2], replace(settled[2], prepared=str(folder))]
    with config_error("data.mix[2].prepared", str(folder), "data.mix[0].prepared", "one tokenizer"):
        settle(replace(mix, data=replace(mix.data, mix=others)), None, quiet)
    # a prepared part gives its tokenizer to the others
    taken, _ = settle(mixed(texts, tmp_path / "taken", prepared=str(folder)), None, quiet)
    theirs, _ = settle(alone, None, quiet)
    assert {one.tokenizer for one in taken.parts} == {theirs.tokenizer}
    # fewer samples than the run draws
    few = [replace(part, epochs_at_most=0.1) for part in settled]
    with config_error("data.mix", "leave 215 samples", "1,000 of 50 steps", "10 steps"):
        settle(replace(mix, data=replace(mix.data, mix=few)), None, quiet)
    # a copy under another name is the same text
    shutil.copy(texts / "b.jsonl", tmp_path / "copy.jsonl")
    with config_error("data.validation.v", "which the run is trained on"):
        settle(mixed(texts, tmp_path / "first", validation={"v": str(tmp_path / "copy.jsonl")}))


def test_one_of_two_ways(tmp_path: Path) -> None:
    def refused(line: str, **sections: dict[str, Any]) -> None:
        with pytest.raises(configuration.ConfigError) as caught:
            configuration.from_dict({"model": {"family": "gpt2"}, **sections})
        assert line in str(caught.value)

    part = {"corpus": "a", "weight": 1}
    refused("data.mix: got []; accepted: one part or more", data={"mix": []})
    refused("data.mix[0].weight: got 0.0; accepted: from", data={"mix": [part | {"weight": 0}]})
    refused("data.mix[0].weight: got -1.0", data={"mix": [part | {"weight": -1}]})
    refused("data.mix[0].weight: missing", data={"mix": [{"corpus": "a"}]})
    refused("data.mix[0].epochs: unknown key; did you mean data.mix.epochs_at_most?",
            data={"mix": [part | {"epochs": 1}]})  # fmt: skip
    for key in ("corpus", "prepared"):
        refused(f"data.{key}: got 'b' beside data.mix", data={"mix": [part], key: "b"})
    refused("data.validation: got the name 'held_out'", data={"validation": {"held_out": "a"}})
    refused("train.eval_samples: got 5 beside train.eval_tokens",
            train={"eval_tokens": 100, "eval_samples": 5})  # fmt: skip
    values = {"model": {"family": "gpt2"}, "train": {"eval_tokens": 4096},
              "data": {"mix": [part], "validation": {"w": "x", "v": {"corpus": "y"}}}}  # fmt: skip
    config = configuration.from_dict(values)
    file = tmp_path / "c.yaml"
    file.write_text(configuration.to_yaml(config))
    for resolved in (False, True):
        assert configuration.load(file, resolved=resolved) == config
    older = configuration.load(file, ["train.eval_tokens=null", "train.eval_samples=8"])
    assert (older.train.eval_tokens, older.train.eval_samples) == (None, 8)
