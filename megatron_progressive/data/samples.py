"""The samples of a prepared corpus, and the order in which training draws them.

Both are functions of their arguments alone: what a step trains on depends on the seed and on the
number of samples before it, not on the layout, the batch size or an earlier run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from megatron_progressive.runtime.draws import order

if TYPE_CHECKING:
    import torch


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
