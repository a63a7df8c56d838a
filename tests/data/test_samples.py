"""Samples are the windows of the stream; the order is a permutation that depends on nothing
but the seed and the number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_progressive import data as data_room
from megatron_progressive.data.megatron import indexed_dataset
from megatron_progressive.data.samples import Samples, TrainingData
from megatron_progressive.data.stream import Piece, TokenStream
from megatron_progressive.runtime.draws import order
from tests.data.small_corpora import make_config, make_documents, quiet, write_json_lines


def numbers(*bounds: int) -> np.ndarray:
    return np.arange(*bounds, dtype=np.int64)


def write_split(prefix: Path, documents: list[np.ndarray], dtype: type) -> None:
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("length", [1, 7, 32, 146])
def test_samples_are_windows_of_the_stream(tmp_path: Path, dtype: type, length: int) -> None:
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    sizes = [1, 50, 3, 1, 20, 65, 7]  # 147 tokens
    write_split(tmp_path / "s", [rng.integers(0, top, size) for size in sizes], dtype)
    dataset = indexed_dataset().IndexedDataset(str(tmp_path / "s"))
    stream = [int(token) for n in range(len(dataset)) for token in dataset.get(n)]
    tokens = np.dtype(dtype).name
    samples = Samples(TokenStream([Piece(tmp_path / "s.bin", 0, 147)], tokens), length)
    assert samples.tokens == len(stream) == 147
    # the same in pieces, in files of their own or within one
    one, two, three = (tmp_path / f"{name}.bin" for name in "abc")
    content = (tmp_path / "s.bin").read_bytes()
    one.write_bytes(content[: 60 * np.dtype(dtype).itemsize])
    two.write_bytes(content[60 * np.dtype(dtype).itemsize :])
    three.write_bytes(content[50 * np.dtype(dtype).itemsize :])
    cut = [Piece(one, 0, 60), Piece(two, 0, 1), Piece(three, 11, 39), Piece(two, 40, 47)]
    in_pieces = Samples(TokenStream(cut, tokens), length)
    assert torch.equal(in_pieces.get(range(len(samples))), samples.get(range(len(samples))))
    assert in_pieces.tokens == 147
    expected = []
    for start in range(0, len(stream), length):
        if start + length + 1 <= len(stream):
            expected.append(stream[start : start + length + 1])
    assert len(samples) == len(expected)
    got = samples.get(range(len(samples)))
    assert got.dtype == torch.int64
    assert got.tolist() == expected
    assert samples.get([len(samples) - 1, 0, 0]).tolist() == [expected[-1], *[expected[0]] * 2]
    assert samples.get([]).shape == (0, length + 1)


def test_samples_outside_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path / "s", [np.arange(9)], np.uint16)
    stream = TokenStream([Piece(tmp_path / "s.bin", 0, 9)], "uint16")
    samples = Samples(stream, 4)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            samples.get([index])
    assert len(Samples(stream, 9)) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_every_epoch_is_a_permutation(size: int) -> None:
    epochs = order(5, numbers(4 * size), size).reshape(4, size)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(size))
    if size > 60:
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_depends_on_seed_and_number_alone() -> None:
    size, count = 97, 500
    whole = order(3, numbers(count), size)
    assert [order(3, n, size) for n in range(0, count, 7)] == whole[::7].tolist()
    for width in (1, 16, 96, 97, 211):
        parts = [order(3, numbers(a, min(a + width, count)), size) for a in range(0, count, width)]
        assert np.concatenate(parts).tolist() == whole.tolist()
    shuffled = np.random.default_rng(0).permutation(numbers(count))
    assert order(3, shuffled.reshape(50, 10), size).tolist() == (
        whole[shuffled].reshape(50, 10).tolist()
    )
    assert isinstance(order(3, 0, size), int)
    assert order(2**63 - 1, numbers(size), size).tolist() != whole[:size].tolist()


def test_order_never_changes() -> None:
    """A run that another version resumes must go on with the same samples."""
    assert order(1, numbers(12), 10).tolist() == GOLDEN_SMALL
    far = np.array([0, 10**6, 10**12, 2**62], dtype=np.int64)
    assert order(2**63 - 1, far, 10**9 + 7).tolist() == GOLDEN_LARGE


GOLDEN_SMALL = [9, 6, 2, 5, 1, 4, 3, 8, 7, 0, 9, 4]
GOLDEN_LARGE = [161149481, 415956305, 751428029, 306482312]


def test_order_looks_random() -> None:
    # of any seed, each place is equally likely to come first, and to follow another
    size, seeds = 8, 4000
    draws = np.array([order(seed, numbers(2), size) for seed in range(seeds)])
    first = np.bincount(draws[:, 0], minlength=size)
    pairs = np.bincount(draws[:, 0] * size + draws[:, 1], minlength=size * size)
    pairs = pairs.reshape(size, size)[~np.eye(size, dtype=bool)]
    for counts in (first, pairs):
        expected = seeds / len(counts)
        chi2 = float(((counts - expected) ** 2).sum() / expected)
        freedom = len(counts) - 1
        assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5  # five standard deviations
    # within an epoch, neighbours are unrelated
    places = order(0, numbers(20_000), 20_000).astype(float)
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(places, np.arange(20_000))[0, 1]) < 0.03


def test_order_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="draws from -1 of 5"):
        order(0, -1, 5)
    with pytest.raises(ValueError, match="0 samples"):
        order(0, 0, 0)


def test_training_data(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "c.jsonl", make_documents(80))
    config = make_config(tmp_path, corpus, validation_fraction=0.1)
    data_room.prepare(config, quiet)
    data = TrainingData.open(config)
    size = len(data.train)
    # an epoch reads every sample once, whatever the batches are
    epoch = torch.cat([data.train_batch(a, min(30, size - a)) for a in range(0, size, 30)])
    assert sorted(epoch.tolist()) == sorted(data.train.get(range(size)).tolist())
    assert epoch.tolist() != data.train.get(range(size)).tolist()
    assert data.train_batch(size - 2, 4)[:2].tolist() == epoch[-2:].tolist()
    assert TrainingData.open(config).train_batch(0, 9).tolist() == epoch[:9].tolist()
    # validation is in plain order and wraps around
    plain = data.validation.get(range(len(data.validation))).tolist()
    count = len(plain) + 3
    assert data.validation_batch(0, count).tolist() == (plain + plain)[:count]
    assert data.validation_batch(len(plain) - 1, 2).tolist() == [plain[-1], plain[0]]


def test_seed_changes_the_order_only(tmp_path: Path) -> None:
    from dataclasses import replace

    corpus = write_json_lines(tmp_path / "c.jsonl", make_documents(80))
    config = make_config(tmp_path, corpus, validation_fraction=0.1)
    data_room.prepare(config, quiet)
    other = replace(config, run=replace(config.run, seed=2))
    assert data_room.prepared_folder(other) == data_room.prepared_folder(config)
    one, two = TrainingData.open(config), TrainingData.open(other)
    size = len(one.train)
    assert one.train_batch(0, size).tolist() != two.train_batch(0, size).tolist()
    assert one.validation_batch(0, 5).tolist() == two.validation_batch(0, 5).tolist()


def test_views_outlive_the_reader_without_complaint(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    write_split(tmp_path / "s", [np.arange(9)], np.uint16)
    stream = TokenStream([Piece(tmp_path / "s.bin", 0, 9)], "uint16")
    rows = Samples(stream, 4).get([0, 1])
    del stream  # the reader is gone here
    assert rows.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert not recwarn.list
