"""A mixture of corpora: checked, prepared and settled part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data import settling
from megatron_progressive.data.documents import Sample, with_documents
from megatron_progressive.data.identity import DataIdentity, mix_words, mixed_identity
from megatron_progressive.data.manifest import TOKENIZER
from megatron_progressive.data.mixture import LONGEST_PERIOD, Blend
from megatron_progressive.data.parts import at_most, check_enough, named, part_configs, tokens_of
from megatron_progressive.data.prepare import check, prepare
from megatron_progressive.data.samples import Samples, TrainingData
from megatron_progressive.data.settling import Begun
from megatron_progressive.data.shared_tokenizer import (
    check_one_tokenizer,
    make_shared_tokenizer,
    shared_tokenizer,
)
from megatron_progressive.runtime.draws import order
from megatron_progressive.runtime.progress import ShowBytes


def check_mix(config: RunConfig) -> None:
    """Check that a mixture can be trained on, without writing anything.

    Raises:
        ConfigError: a share is too small, a part cannot be trained on (see :func:`.prepare.check`),
            or the parts have different tokenizers.
    """
    mix = config.data.mix or []
    total = sum(part.weight for part in mix)
    for number, part in enumerate(mix):
        if part.weight / total < 1 / LONGEST_PERIOD:
            raise ConfigError(
                f"data.mix[{number}].weight: got {part.weight:g}, which is "
                f"{part.weight / total:.2g} of all; accepted: a share from {1 / LONGEST_PERIOD:g}"
            )
    for number, one in enumerate(part_configs(config, shared_tokenizer(config))):
        with named(f"data.mix[{number}]"):
            check(one)
    check_one_tokenizer(config)


def prepare_mix(
    config: RunConfig, progress: ShowBytes | None = None, workers: int | None = None
) -> list[Path]:
    """The folders of the prepared parts, which are made now where they are not there.

    Raises:
        ConfigError: see :func:`.prepare.prepare`.
    """
    tokenizer = make_shared_tokenizer(config, part_configs(config), progress)
    folders = []
    for number, one in enumerate(part_configs(config, tokenizer)):
        with named(f"data.mix[{number}]"):
            folders.append(prepare(one, progress, workers))
    return folders


def settle_mix(
    config: RunConfig, begun: Begun | None, progress: ShowBytes | None
) -> tuple[DataIdentity, list[str]]:
    """What a run on a mixture is trained on, as :func:`.settling.settle_corpus` has it."""
    known = None if begun is None else begun.data
    parts = part_configs(config)
    if begun is not None and known is not None and len(known.parts) != len(parts):
        raise ConfigError(
            f"data.mix: got a {mix_words(config)}, and {begun.what} was trained on "
            f"{known.corpus}; accepted: that, or {begun.another}"
        )
    tokenizer = None
    if known is not None:
        kept = [
            settling.kept_folder(one, part) for one, part in zip(parts, known.parts, strict=True)
        ]
        tokenizer = next((str(folder / TOKENIZER) for folder in kept if folder), None)
    if tokenizer is None:
        check_mix(config)
        tokenizer = make_shared_tokenizer(config, parts, progress)
    found, notes = [], []
    for number, one in enumerate(part_configs(config, tokenizer)):
        before = (
            begun if known is None or begun is None else replace(begun, data=known.parts[number])
        )
        with named(f"data.mix[{number}]"):
            identity, said = settling.settle_corpus(one, before, progress)
        found.append(identity)
        notes += said
    whole = mixed_identity(config, found)
    _check_tokenizers(config, found)
    check_enough(config, tokens_of(whole))
    if begun is not None and known is not None and whole.fingerprint != known.fingerprint:
        raise ConfigError(
            f"data.mix: got a {whole.corpus}, and {begun.what} was trained on a {known.corpus}; "
            f"accepted: that with the same limits, or {begun.another}"
        )
    return whole, notes


def _check_tokenizers(config: RunConfig, found: Sequence[DataIdentity]) -> None:
    for number, one in enumerate(found):
        if one.tokenizer != found[0].tokenizer:
            raise ConfigError(
                f"data.mix[{number}]: got {one.prepared}, whose tokenizer is not that of "
                f"data.mix[0] {found[0].prepared}; accepted: parts with one tokenizer"
            )


class MixedData:
    """The batches of a run on a mixture, as functions of the run's seed and of the numbers of
    samples. Validation reads the held-out text of the parts, in the proportions of their weights,
    until that of one part is used up."""

    def __init__(self, parts: Sequence[TrainingData], config: RunConfig) -> None:
        """Args:
        parts: the data of each part, alone.
        config: the run, for the weights and limits of the parts.
        """
        mix = config.data.mix or []
        weights = [part.weight for part in mix]
        self.parts, self.seed = parts, config.run.seed
        self._documents = config.data.attention is not None
        self.blend = Blend(weights, at_most(mix, [len(part.train) for part in parts]))
        self._held_out = Blend(weights, [len(part.validation) for part in parts])

    @classmethod
    def open(cls, config: RunConfig) -> MixedData:
        """The prepared parts of ``config``, which are all named in it (:func:`.as_settled`), or
        which :func:`prepare_mix` has made.

        Raises:
            ConfigError: a part is not there, not whole, or does not fit the model.
        """
        parts = []
        for number, one in enumerate(part_configs(config, shared_tokenizer(config))):
            with named(f"data.mix[{number}]"):
                parts.append(TrainingData.open(one))
        return cls(parts, config)

    @property
    def validation_samples(self) -> int:
        """The number of samples of held-out text that have the proportions of the mixture."""
        return min(self._held_out.used_up.values())

    def train_batch(self, first_sample: int, count: int) -> Sample:
        """Draws ``first_sample`` to ``first_sample + count`` of training, as int64 [count, S + 1],
        or the same with documents."""
        numbers = np.arange(first_sample, first_sample + count, dtype=np.int64)
        parts, draws = self.blend.locate(numbers)
        for part, data in enumerate(self.parts):
            mine = parts == part
            draws[mine] = order(self.seed, draws[mine], len(data.train), part)
        return self._gathered(parts, draws, [data.train for data in self.parts])

    def validation_batch(self, first: int, count: int) -> Sample:
        """Samples ``first`` to ``first + count`` of validation in plain order, as int64 [count, S +
        1], or the same with documents; the first sample follows the last."""
        numbers = np.arange(first, first + count, dtype=np.int64) % self.validation_samples
        parts, draws = self._held_out.locate(numbers)
        return self._gathered(parts, draws, [data.validation for data in self.parts])

    def _gathered(
        self, parts: NDArray[np.int64], rows: NDArray[np.int64], sources: Sequence[Samples]
    ) -> Sample:
        """The sample ``rows[i]`` of source ``parts[i]`` for each i."""
        import torch

        length = sources[0].sequence_length + 1
        found = torch.empty((len(rows), length), dtype=torch.int64)
        for part in np.unique(parts):
            mine = np.flatnonzero(parts == part)
            found[torch.from_numpy(mine)] = sources[part].get(rows[mine])
        if not self._documents:
            return found
        return with_documents(found, self.parts[0].manifest.end_of_document)
