"""Validation sets: the held-out text of a run, and further sets by name.

A validation reads the first samples of each set, as many as ``train.eval_tokens`` asks for and none
twice, whatever the batch and the layout. Its loss in nats per token depends on the tokenizer; bits
per byte do not: they are the nats of all tokens that were predicted, over ln 2 and the bytes of
UTF-8 text which those tokens stand for (:mod:`.token_bytes`). The token that ends a document stands
for no byte; its loss counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data import settling
from megatron_progressive.data.corpus import open_corpus
from megatron_progressive.data.documents import Sample, tokens_in, with_documents
from megatron_progressive.data.identity import DataIdentity, differ, prepared_identity
from megatron_progressive.data.manifest import SPLITS, read_manifest
from megatron_progressive.data.parts import named, set_configs, training_configs
from megatron_progressive.data.prepare import prepare
from megatron_progressive.data.samples import open_samples
from megatron_progressive.data.settling import Begun
from megatron_progressive.data.tokenizer import check_vocabulary
from megatron_progressive.models import model_shape, transformer_shape
from megatron_progressive.runtime.progress import ShowBytes

HELD_OUT = "held_out"
"""The name of the held-out text of the run among its validation sets."""


@dataclass(frozen=True)
class HeldOut:
    """One validation set."""

    read: Callable[[int, int], Any]
    """``read(first, count)``: samples by number; the first follows the last."""
    samples: int | None
    """The number of its samples; None where there are as many as one asks for."""
    text_bytes: Callable[[int], int | None]
    """The bytes of text that the targets of its first so many samples stand for; None where that is
    not known, or where it is no text."""


def wanted_samples(config: RunConfig) -> int:
    """The number of samples that a validation is to read of each set: those that
    ``train.eval_tokens`` fills, one at least, or ``train.eval_samples``."""
    tokens = config.train.eval_tokens
    if tokens is None:
        assert config.train.eval_samples is not None
        return config.train.eval_samples
    return max(1, tokens // model_shape(config).sample_units)


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """The loss of ``tokens`` in bits per byte of the ``text_bytes`` that they stand for."""
    return nats_per_token * tokens / (math.log(2) * text_bytes)


def check_sets(config: RunConfig) -> None:
    """Check that the further validation sets are there and are not what the run is trained on,
    without writing anything.

    Raises:
        ConfigError: a corpus is not there, or is trained on.
    """
    trained = training_configs(config)
    for name, one in set_configs(config).items():
        field = f"data.validation.{name}"
        assert config.data.validation is not None
        with named(field):
            if one.data.prepared is not None:
                read_manifest(Path(one.data.prepared))
            else:
                open_corpus(one.data)
        if config.data.validation[name].split == "all" and any(_same(one, t) for t in trained):
            raise _trained_on(field, one)


def settle_sets(
    config: RunConfig, trained_on: DataIdentity, begun: Begun | None, progress: ShowBytes | None
) -> tuple[dict[str, DataIdentity], list[str]]:
    """What the further validation sets are, prepared and whole, and what the user should be told
    about them.

    Args:
        config: the configuration of the run.
        trained_on: what the run is trained on, whose tokenizer serves the sets.
        begun: what is continued; None for a fresh start.
        progress: told how far a preparation is (default: it is shown on standard error).

    Raises:
        ConfigError: a set is not there, is shorter than one sample, has another tokenizer, is
            trained on, or is not what ``begun`` was validated on.
    """
    found: dict[str, DataIdentity] = {}
    notes: list[str] = []
    known = {} if begun is None or begun.data is None else begun.data.validation
    trained = {read_manifest(folder).splits["train"].sha256 for folder in trained_on.folders}
    for name, one in set_configs(config, str(trained_on.tokenizer_folder)).items():
        field = f"data.validation.{name}"
        with named(field):
            found[name], said = _settled(one, known.get(name), begun, progress)
        notes += said
        folder = Path(found[name].prepared or "")
        manifest = read_manifest(folder)
        if found[name].tokenizer != trained_on.tokenizer:
            raise ConfigError(
                f"{field}.prepared: got {folder}, whose tokenizer is not that of "
                f"{trained_on.folders[0]}; accepted: a folder that was prepared with it"
            )
        assert config.data.validation is not None
        splits = _splits(config.data.validation[name].split)
        if any(manifest.splits[split].sha256 in trained for split in splits):
            raise _trained_on(field, one)
        length = transformer_shape(config).sequence_length
        tokens = max(manifest.splits[split].tokens for split in splits)
        if tokens <= length:
            raise ConfigError(
                f"{field}: got {one.data.corpus}, of {tokens} tokens; accepted: at least "
                f"{length + 1} (data.sequence_length {length})"
            )
    return found, notes


def _settled(
    config: RunConfig, known: DataIdentity | None, begun: Begun | None, progress: ShowBytes | None
) -> tuple[DataIdentity, list[str]]:
    if known is not None and config.data.prepared is None:
        kept = settling.kept_folder(config, known)
        if kept is not None:
            return replace(known, prepared=str(kept.absolute())), []
    found = prepared_identity(prepare(config, progress))
    check_vocabulary(
        transformer_shape(config).vocab_size,
        read_manifest(Path(found.prepared or "")).vocab_size,
        config.data.tokenizer,
    )
    if begun is not None and differ(known, found):
        raise settling.other_data(config, replace(begun, data=known), found)
    return found, []


def _splits(split: str) -> tuple[str, ...]:
    return SPLITS if split == "all" else (split,)


def _same(one: RunConfig, other: RunConfig) -> bool:
    """Whether two configurations name the same text."""
    mine, theirs = one.data, other.data
    if mine.prepared is not None or theirs.prepared is not None:
        return mine.prepared == theirs.prepared
    if (mine.text_field, mine.max_bytes) != (theirs.text_field, theirs.max_bytes):
        return False
    first, second = open_corpus(mine), open_corpus(theirs)
    if first.is_sources or second.is_sources:  # whose content takes long to read
        return mine.corpus == theirs.corpus
    return first.identity() == second.identity()


def _trained_on(field: str, one: RunConfig) -> ConfigError:
    return ConfigError(
        f"{field}: got {one.data.corpus}, which the run is trained on; accepted: other text, or "
        "split: validation for what is held out of it"
    )


class JoinedSamples:
    """The samples of one or more splits of a prepared corpus, one split after the other."""

    def __init__(
        self, folder: Path, split: str, sequence_length: int, documents: bool = False
    ) -> None:
        """Args:
        folder: the prepared corpus.
        split: ``all``, or the name of one.
        documents: whether samples are given with their documents.
        """
        self._end = read_manifest(folder).end_of_document if documents else None
        self._sources = [open_samples(folder, name, sequence_length) for name in _splits(split)]
        self._firsts = np.cumsum([0, *(len(source) for source in self._sources)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def batch(self, first: int, count: int) -> Sample:
        """Samples ``first`` to ``first + count``, int64 [count, S + 1], or the same with documents;
        the first sample follows the last."""
        import torch

        numbers = np.arange(first, first + count, dtype=np.int64) % len(self)
        which = np.searchsorted(self._firsts, numbers, side="right") - 1
        rows = [
            self._sources[k].get([n - self._firsts[k]]) for k, n in zip(which, numbers, strict=True)
        ]
        tokens = torch.cat(rows)
        return tokens if self._end is None else with_documents(tokens, self._end)


def further_sets(config: RunConfig, lengths: Sequence[int] | None) -> dict[str, HeldOut]:
    """The further validation sets of a run, which are all prepared and named in ``config``
    (:func:`.as_settled`).

    Args:
        lengths: the number of bytes of each token; None where it is not known.
    """
    found = {}
    shape = transformer_shape(config) if config.data.validation else None
    for name, one in (config.data.validation or {}).items():
        assert one.prepared is not None, "settled before"
        assert shape is not None
        documents = config.data.attention is not None
        folder = Path(one.prepared)
        samples = JoinedSamples(folder, one.split, shape.sequence_length, documents)
        found[name] = HeldOut(samples.batch, len(samples), counter(samples.batch, lengths))
    return found


def counter(
    read: Callable[[int, int], Any], lengths: Sequence[int] | None
) -> Callable[[int], int | None]:
    """A function that counts the bytes of text which the targets of the first samples stand for."""

    def count(samples: int) -> int | None:
        if lengths is None:
            return None
        table, total = np.asarray(lengths, dtype=np.int64), 0
        for first in range(0, samples, 1024):
            batch = read(first, min(1024, samples - first))
            targets = tokens_in(batch)[:, 1:].numpy()
            total += int(table[targets].sum())
        return total

    return count
