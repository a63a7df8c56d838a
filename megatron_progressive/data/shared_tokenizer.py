"""The one tokenizer of all parts of a mixture.

Where ``data.tokenizer`` is ``bpe``, it is trained on equal amounts of the training text of each
part, whatever the weights: so runs that differ in nothing but their weights have the same
vocabulary, their losses can be compared, and each part is prepared once for all of them. Parts that
are prepared already bring theirs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.config.places import check_writable
from megatron_progressive.data.corpus import open_corpus
from megatron_progressive.data.identity import prepared_identity
from megatron_progressive.data.manifest import TOKENIZER
from megatron_progressive.data.tokenizer import (
    SAMPLE_BYTES,
    is_tokenizer,
    load_tokenizer,
    train_bpe,
    training_sample,
)
from megatron_progressive.models import transformer_shape
from megatron_progressive.runtime.files import fsync_path, writing
from megatron_progressive.runtime.progress import ShowBytes, show_byte_stages

_FORMAT = 1
"""Raise this number when the same parts would give another tokenizer."""


def shared_tokenizer(config: RunConfig) -> str:
    """The ``data.tokenizer`` of the parts of a mixture, as far as it is there: the run's, or that
    of parts that are prepared, or the one that was trained on the parts. ``bpe`` where that is yet
    to be trained. Nothing is written."""
    if config.data.tokenizer != "bpe":
        return config.data.tokenizer
    for part in config.data.mix or ():
        if part.prepared is not None:
            return str(Path(part.prepared) / TOKENIZER)
    try:
        folder = _folder(config)
    except ConfigError:  # a part is not there
        return "bpe"
    return str(folder) if is_tokenizer(folder) else "bpe"


def make_shared_tokenizer(
    config: RunConfig, parts: Sequence[RunConfig], progress: ShowBytes | None
) -> str:
    """The ``data.tokenizer`` of the parts of a mixture, which is trained now where it is not there.

    Args:
        parts: the configurations of the parts.
        progress: told how far it is (default: it is shown on standard error).

    Raises:
        ConfigError: a part is not there, or the vocabulary is too small.
        WriteFailed: the disk is full or fails.
    """
    found = shared_tokenizer(config)
    if found != "bpe":
        return found
    size = transformer_shape(config).vocab_size
    load_tokenizer(config.data, size)  # fails fast on a vocabulary that is too small
    folder = _folder(config)
    check_writable("run.dir", folder.parent)
    corpora = [open_corpus(part.data).pinned() for part in parts]
    # in an order of their own: it does not matter in which one the mixture has them
    corpora.sort(key=lambda corpus: json.dumps(corpus.identity()))
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp"
    with contextlib.ExitStack() as stack:
        tell = progress or stack.enter_context(show_byte_stages("data"))
        sample: list[str] = []
        for corpus in corpora:
            tell(f"training a tokenizer on {corpus.name}", 0, None)
            each = SAMPLE_BYTES // len(corpora)
            sample += training_sample(
                corpus, config.data.validation_fraction, bool(config.data.validation_near), each
            )
        tokenizer = train_bpe(sample, size)
        stack.enter_context(writing(f"writing {folder}"))
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            tokenizer.save(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                fsync_path(path)
            try:
                os.rename(temporary, folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another was first
                    raise
            fsync_path(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return str(folder)


def check_one_tokenizer(config: RunConfig) -> None:
    """Check that the parts that are prepared have one tokenizer, and the one that the run names.

    Raises:
        ConfigError: they have not, or a part is not whole.
    """
    first: tuple[int, str | None] | None = None
    mix = config.data.mix or []
    for number, part in enumerate(mix):
        if part.prepared is None:
            continue
        found = prepared_identity(Path(part.prepared)).tokenizer
        if first is None:
            first = number, found
        elif found != first[1]:
            raise ConfigError(
                f"data.mix[{number}].prepared: got {part.prepared}, whose tokenizer is not that "
                f"of data.mix[{first[0]}].prepared {mix[first[0]].prepared}; accepted: parts that "
                "were prepared with one tokenizer"
            )
    if first is None or config.data.tokenizer == "bpe":
        return
    size, folder = transformer_shape(config).vocab_size, mix[first[0]].prepared
    theirs = load_tokenizer(replace(config.data, tokenizer=f"{folder}/{TOKENIZER}"), size)
    ours = load_tokenizer(config.data, size)
    assert ours is not None
    assert theirs is not None
    if not ours.tokens_as(theirs) or ours.end_of_document != theirs.end_of_document:
        raise ConfigError(
            f"data.mix[{first[0]}].prepared: got {folder}, whose tokenizer is not data.tokenizer "
            f"{config.data.tokenizer}; accepted: parts that were prepared with it"
        )


def _folder(config: RunConfig) -> Path:
    """The folder of the tokenizer that is trained on the parts: its name tells what it was trained
    on, whatever the order and the weights of the parts."""
    data = config.data
    parts = sorted(
        json.dumps(
            [
                open_corpus(replace(data, corpus=part.corpus)).identity(),
                data.text_field if part.text_field is None else part.text_field,
                data.max_bytes if part.max_bytes is None else part.max_bytes,
            ]
        )
        for part in data.mix or ()
    )
    size = transformer_shape(config).vocab_size
    decides = [_FORMAT, parts, size, data.validation_fraction]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    return Path(config.run.dir) / "data" / f"tokenizer-{digest[:10]}"
