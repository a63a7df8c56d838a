"""The samples of a prepared corpus, and the order in which training draws them.

Both are functions of their arguments alone: what a step trains on depends on the seed and on the
number of samples before it, not on the layout, the batch size or an earlier run.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from megatron_progressive.config import RunConfig
from megatron_progressive.data.documents import Sample, with_documents
from megatron_progressive.data.manifest import (
    SPLITS,
    Manifest,
    check_fit,
    prepared_folder,
    read_manifest,
)
from megatron_progressive.data.stream import TokenStream
from megatron_progressive.models import transformer_shape

if TYPE_CHECKING:
    import torch

# With 8, pairs of draws are visibly uneven in splits of 6 or 8 samples; with 12 no more.
_ROUNDS = 16


class Samples:
    """Windows over one split, whose documents are one stream of tokens.

    With S the sequence length, sample i consists of the S + 1 tokens [i*S, i*S + S] of the stream:
    the first S are the inputs, the last S the targets, and every token but the first is a target
    once.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        """Cut the tokens of a split, which :func:`~.prepare.prepare` wrote."""
        self._stream = stream
        self.sequence_length = sequence_length
        self.tokens = len(stream)
        """The number of tokens in the split."""

    def __len__(self) -> int:
        """The number of samples in the split; the last tokens, which do not fill a sample, are left
        out."""
        return max(0, (self.tokens - 1) // self.sequence_length)

    def get(self, indices: Iterable[int] | NDArray[np.int64]) -> torch.Tensor:
        """The samples ``indices`` [n], as int64 [n, S + 1].

        Raises:
            IndexError: an index is below 0, or not below ``len(self)``.
        """
        import torch

        rows = np.asarray(
            indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int64
        )
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"samples {rows.min()} to {rows.max()} of {len(self)}")
        starts = rows * self.sequence_length
        return torch.from_numpy(self._stream.windows(starts, self.sequence_length + 1))


def open_samples(folder: Path, split: str, sequence_length: int) -> Samples:
    """The samples of one split of a prepared corpus.

    Raises:
        ConfigError: the corpus is not there, or not whole.
    """
    manifest = read_manifest(folder)
    return Samples(TokenStream(manifest.pieces(folder, split), manifest.dtype), sequence_length)


@overload
def order(seed: int, numbers: int, size: int, part: int = 0) -> int: ...
@overload
def order(seed: int, numbers: NDArray[np.int64], size: int, part: int = 0) -> NDArray[np.int64]: ...
def order(
    seed: int, numbers: int | NDArray[np.int64], size: int, part: int = 0
) -> int | NDArray[np.int64]:
    """The number of the sample that each draw of training takes.

    Draw ``n`` is in epoch ``n // size``; every epoch is a permutation of ``range(size)`` keyed by
    (seed, epoch), and is never stored: a Feistel network permutes the least power of two that holds
    ``size``, and what lands outside walks on until it is inside (Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains", methods 2 and 3).

    Args:
        seed: the run's ``run.seed``.
        numbers: the numbers of draws, from 0, as one number or an array of any shape.
        size: the number of samples in the split.
        part: the place of the corpus in a mixture, each part of which has an order of its own.

    Returns:
        Sample numbers in ``range(size)``, of the shape of ``numbers``.

    Raises:
        ValueError: a draw is negative, or there are no samples.
    """
    draws = np.asarray(numbers, dtype=np.int64)
    if size < 1 or (draws.size and draws.min() < 0):
        raise ValueError(f"draws from {draws.min() if draws.size else 0} of {size} samples")
    epochs, places = np.divmod(draws, size)
    result = np.empty_like(places)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        result[mine] = _permuted(places[mine], size, _round_keys(seed, int(epoch), part))
    return int(result) if isinstance(numbers, int) else result


def _round_keys(seed: int, epoch: int, part: int) -> list[np.uint64]:
    message = b"order of samples" + struct.pack("<QQ", seed, epoch)
    message += struct.pack("<Q", part) if part else b""
    digest = hashlib.shake_128(message).digest(8 * _ROUNDS)
    return [np.uint64(key) for key in struct.unpack(f"<{_ROUNDS}Q", digest)]


def _permuted(places: NDArray[np.int64], size: int, keys: list[np.uint64]) -> NDArray[np.int64]:
    """``places`` under the permutation of ``range(size)`` that ``keys`` choose."""
    bits = (size - 1).bit_length()
    values = _feistel(places.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], bits, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of the numbers of ``bits`` bits. Each round adds a hash of one half to the
    other half, which the same round undoes."""
    low_bits = np.uint64((bits + 1) // 2)
    low_mask = np.uint64((1 << ((bits + 1) // 2)) - 1)
    high_mask = np.uint64((1 << (bits // 2)) - 1)
    high, low = values >> low_bits, values & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            high = high ^ (_mixed(low ^ key) & high_mask)
        else:
            low = low ^ (_mixed(high ^ key) & low_mask)
    return (high << low_bits) | low


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014; constants of Stafford's mix 13)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class TrainingData:
    """The batches of a run, as functions of the run's seed and of the numbers of samples."""

    train: Samples
    validation: Samples
    manifest: Manifest
    seed: int
    documents: bool = False
    """Whether samples are given with their documents (:mod:`.documents`)."""

    @classmethod
    def open(cls, config: RunConfig) -> TrainingData:
        """The prepared corpus of ``config``, which :func:`~.prepare.prepare` has made.

        Raises:
            ConfigError: the corpus is not there, not whole, or does not fit the model.
        """
        folder = prepared_folder(config)
        manifest = read_manifest(folder)
        check_fit(config, manifest)
        length = transformer_shape(config).sequence_length
        train, validation = (open_samples(folder, split, length) for split in SPLITS)
        documents = config.data.attention is not None
        return cls(train, validation, manifest, config.run.seed, documents)

    @property
    def validation_samples(self) -> int:
        """The number of samples in the validation split."""
        return len(self.validation)

    def train_batch(self, first_sample: int, count: int) -> Sample:
        """Draws ``first_sample`` to ``first_sample + count`` of training, as int64 [count, S + 1],
        or the same with documents."""
        draws = np.arange(first_sample, first_sample + count, dtype=np.int64)
        return self._known(self.train.get(order(self.seed, draws, len(self.train))))

    def validation_batch(self, first: int, count: int) -> Sample:
        """Samples ``first`` to ``first + count`` of validation in plain order, as int64 [count, S +
        1], or the same with documents; the first sample follows the last."""
        numbers = np.arange(first, first + count, dtype=np.int64)
        return self._known(self.validation.get(numbers % len(self.validation)))

    def _known(self, tokens: torch.Tensor) -> Sample:
        return with_documents(tokens, self.manifest.end_of_document) if self.documents else tokens
