"""What models are trained on. For text: the corpus, the tokenizer, Megatron's indexed dataset, and
the order of samples. For images: pictures that are drawn or lie in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from megatron_progressive.config import RunConfig
from megatron_progressive.data import images
from megatron_progressive.data import prepare as text
from megatron_progressive.data.identity import (
    DATA_FILE,
    DataIdentity,
    differ,
    mix_words,
    read_identity,
)
from megatron_progressive.data.images import ImageData
from megatron_progressive.data.manifest import prepared_folder
from megatron_progressive.data.mix import MixedData, check_mix, prepare_mix
from megatron_progressive.data.parts import (
    MANY_EPOCHS,
    PartDraws,
    known_tokens,
    mix_warnings,
    part_configs,
    part_draws,
    tokens_of,
)
from megatron_progressive.data.prepare import merge, prepare_shard
from megatron_progressive.data.samples import TrainingData
from megatron_progressive.data.settle import check_keys, settle
from megatron_progressive.data.settling import (
    Begun,
    as_settled,
    changed_since,
    wait_until_seen,
)
from megatron_progressive.data.shared_tokenizer import shared_tokenizer
from megatron_progressive.data.token_bytes import bytes_of_tokens
from megatron_progressive.data.validation import (
    HELD_OUT,
    HeldOut,
    bits_per_byte,
    check_sets,
    counter,
    further_sets,
    wanted_samples,
)
from megatron_progressive.data.work import Shard, shard_of
from megatron_progressive.models import model_shape
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.runtime.progress import ShowBytes

__all__ = [
    "DATA_FILE", "HELD_OUT", "MANY_EPOCHS", "Begun", "Data", "DataIdentity", "HeldOut",
    "MixedData", "PartDraws", "Shard", "TrainingData", "as_settled", "bits_per_byte",
    "changed_since", "check", "check_keys", "differ", "is_text", "is_unprepared", "known_tokens",
    "merge", "mix_warnings", "mix_words", "open_data", "part_draws", "prepare", "prepare_shard",
    "prepared_folder", "read_identity", "settle", "shard_of", "tokens_of", "validation_sets",
    "wait_until_seen", "wanted_samples",
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
        ConfigError: it is not there or does not fit (see :func:`.prepare.check`,
            :func:`.mix.check_mix`, :func:`.validation.check_sets` and :func:`.images.check`).
    """
    check_keys(config)
    check_sets(config)
    if config.data.mix:
        check_mix(config)
    else:
        (text if is_text(config) else images).check(config)


def prepare(
    config: RunConfig, progress: ShowBytes | None = None, workers: int | None = None
) -> Path | None:
    """Prepare the run's corpus where that has not been done; returns its folder, or None for
    images, which are read as they are. Of a mixture it is the folder of the first part.

    Args:
        config: the configuration of the run.
        progress: told how far the preparation is (default: it is shown on standard error).
        workers: the number of processes that tokenize (default: this one alone, with threads).

    Raises:
        ConfigError: see :func:`.prepare.prepare`.
    """
    if config.data.mix:
        return prepare_mix(config, progress, workers)[0]
    return text.prepare(config, progress, workers) if is_text(config) else None


def is_unprepared(config: RunConfig) -> bool:
    """Whether the run's corpus, or a part of its mixture, has yet to be prepared.

    Raises:
        ConfigError: a corpus or the tokenizer is missing.
    """
    if not is_text(config):
        return False
    parts = part_configs(config, shared_tokenizer(config)) if config.data.mix else [config]
    return not all(prepared_folder(part).exists() for part in parts)


def open_data(config: RunConfig) -> Data:
    """The data of a run, which :func:`check` accepts and :func:`prepare` has prepared.

    Raises:
        ConfigError: the data is not there, or does not fit the model.
    """
    if not is_text(config):
        return ImageData(config)
    return MixedData.open(config) if config.data.mix else TrainingData.open(config)


def validation_sets(config: RunConfig, data: Data) -> dict[str, HeldOut]:
    """The validation sets of a run whose data is settled (:func:`as_settled`): the held-out part of
    ``data`` under the name :data:`HELD_OUT`, and the further ones under theirs."""
    lengths = None
    if is_text(config):
        mix = config.data.mix
        folder = Path((mix[0].prepared if mix else config.data.prepared) or "")
        lengths = bytes_of_tokens(folder)
    main = HeldOut(
        data.validation_batch, data.validation_samples, counter(data.validation_batch, lengths)
    )
    return {HELD_OUT: main, **further_sets(config, lengths)}
