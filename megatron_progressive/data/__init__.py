"""What models are trained on. For text: the corpus, the tokenizer, Megatron's indexed dataset, and
the order of samples. For images: pictures that are drawn or lie in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from megatron_progressive.config import RunConfig
from megatron_progressive.data import images
from megatron_progressive.data import prepare as text
from megatron_progressive.data.identity import DATA_FILE, DataIdentity, differ, read_identity
from megatron_progressive.data.images import ImageData
from megatron_progressive.data.manifest import prepared_folder
from megatron_progressive.data.prepare import merge, prepare_shard
from megatron_progressive.data.samples import TrainingData
from megatron_progressive.data.settling import (
    Begun,
    as_settled,
    changed_since,
    settle,
    wait_until_seen,
)
from megatron_progressive.data.work import Shard, shard_of
from megatron_progressive.models import model_shape
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.runtime.progress import ShowBytes

__all__ = [
    "DATA_FILE", "Begun", "Data", "DataIdentity", "Shard", "TrainingData", "as_settled",
    "changed_since", "check", "differ", "is_text", "is_unprepared", "merge", "open_data", "prepare",
    "prepare_shard", "prepared_folder", "read_identity", "settle", "shard_of", "wait_until_seen",
]  # fmt: skip


class Data(Protocol):
    """The batches of a run, as functions of the run's seed and of the numbers of samples."""

    def train_batch(self, first_sample: int, count: int) -> Any: ...
    def validation_batch(self, first: int, count: int) -> Any: ...
    @property
    def validation_samples(self) -> int | None:
        """The number of samples in the validation split; None where there are as many as one asks
        for."""


def is_text(config: RunConfig) -> bool:
    """Whether a run is trained on text, which is prepared, rather than on pictures."""
    return isinstance(model_shape(config), TransformerShape)


def check(config: RunConfig) -> None:
    """Check that the run's data is there and fits its model, without writing anything.

    Raises:
        ConfigError: it is not there or does not fit (see :func:`.prepare.check` and
            :func:`.images.check`).
    """
    (text if is_text(config) else images).check(config)


def prepare(
    config: RunConfig, progress: ShowBytes | None = None, workers: int | None = None
) -> Path | None:
    """Prepare the run's corpus where that has not been done; returns its folder, or None for
    images, which are read as they are.

    Args:
        config: the configuration of the run.
        progress: told how far the preparation is (default: it is shown on standard error).
        workers: the number of processes that tokenize (default: this one alone, with threads).

    Raises:
        ConfigError: see :func:`.prepare.prepare`.
    """
    return text.prepare(config, progress, workers) if is_text(config) else None


def is_unprepared(config: RunConfig) -> bool:
    """Whether the run's corpus has yet to be prepared.

    Raises:
        ConfigError: the corpus or the tokenizer is missing.
    """
    return is_text(config) and not prepared_folder(config).exists()


def open_data(config: RunConfig) -> Data:
    """The data of a run, which :func:`check` accepts and :func:`prepare` has prepared.

    Raises:
        ConfigError: the data is not there, or does not fit the model.
    """
    return TrainingData.open(config) if is_text(config) else ImageData(config)
