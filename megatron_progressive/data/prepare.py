"""Preparing a corpus: from its text to Megatron's indexed dataset on disk, all of it or nothing."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.config.places import check_writable
from megatron_progressive.data.corpus import Corpus, open_corpus
from megatron_progressive.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    SplitCounts,
    check_fit,
    check_length,
    fingerprint,
    prepared_folder,
    read_manifest,
)
from megatron_progressive.data.megatron import indexed_dataset
from megatron_progressive.data.split import split_documents
from megatron_progressive.data.tally import Tally
from megatron_progressive.data.tokenizer import (
    DocumentTokenizer,
    check_vocabulary,
    load_tokenizer,
    train_bpe,
    training_sample,
)
from megatron_progressive.models import transformer_shape
from megatron_progressive.runtime.files import fsync_path, writing
from megatron_progressive.runtime.progress import ShowBytes, show_byte_stages

if TYPE_CHECKING:
    import numpy as np

BATCH_BYTES = 1 << 20
"""How many bytes of text are tokenized at once."""

STALE_SECONDS = 3600.0
"""A temporary folder to which nobody has written for so many seconds was left by a killed
preparation."""

SMALL_BYTES = 2_000_000
"""Up to how many bytes a corpus is tokenized to check it exactly."""

BOUNDED_BYTES = 16_000_000
"""Up to how many bytes a local corpus is read to check it with bounds."""


def prepare(config: RunConfig, progress: ShowBytes | None = None) -> Path:
    """The folder of the prepared corpus, which is made now where it is not there yet.

    A folder that is there is used as it is. A new one appears under its name only when it is
    complete and on disk; a preparation that is killed leaves at most a hidden folder beside it,
    which a later one removes. Of several at once, the first to finish is kept.

    Args:
        config: the configuration of the run.
        progress: told how far the preparation is (default: it is shown on standard error, with a
            summary at the end).

    Raises:
        ConfigError: the corpus or the tokenizer is missing or unfit, all documents are in one
            split, or the folder is there but is not a whole prepared corpus.
        WriteFailed: the disk is full or fails.
    """
    folder = prepared_folder(config)
    if _is_occupied(folder):
        manifest = read_manifest(folder)
        check_vocabulary(
            transformer_shape(config).vocab_size, manifest.vocab_size, manifest.tokenizer
        )
        return folder
    corpus = open_corpus(config.data).pinned()  # read twice: for the tokenizer, for its tokens
    # before anything is written: fails fast on a tokenizer that is missing or too large
    tokenizer = load_tokenizer(config.data, transformer_shape(config).vocab_size)
    check_writable("run.dir" if config.data.prepared is None else "data.prepared", folder.parent)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp"
    with writing(f"preparing {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        temporary.mkdir()
        try:
            with contextlib.ExitStack() as stack:
                tell = progress or stack.enter_context(show_byte_stages("data"))
                _write(config, corpus, tokenizer, temporary, tell)
            _publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if progress is None:
        for line in read_manifest(folder).summary():
            _say(line)
    return folder


def check(config: RunConfig) -> None:
    """Check that the corpus can be trained on, without writing anything.

    Where the corpus is prepared, the first rank says again what was left out of it. A corpus of up
    to :data:`SMALL_BYTES` that is not prepared is tokenized; of a larger one only what is certain
    from its bytes is checked here, and the rest by ``TrainingData.open``.

    Raises:
        ConfigError: the corpus or the tokenizer is missing or cannot be read, the tokenizer is
            larger than the model's vocabulary, a split is shorter than one sample, or the prepared
            corpus is not whole.
    """
    folder = prepared_folder(config)
    if config.data.prepared is not None or _is_occupied(folder):
        manifest = read_manifest(folder)
        check_fit(config, manifest)
        _recall(manifest)
        return
    shape, data = transformer_shape(config), config.data
    corpus = open_corpus(data)
    tokenizer = load_tokenizer(data, shape.vocab_size)
    kept: list[tuple[str, bool]] = []
    most = dict.fromkeys(SPLITS, 0)
    tally = Tally()
    read, read_at_most = 0, SMALL_BYTES if corpus.is_hub else BOUNDED_BYTES
    for text, held_out in split_documents(corpus.documents(tally), data.validation_fraction):
        size = len(text.encode())
        read += size
        # a token is a byte at least, but for those that some tokenizers put before a text
        most[SPLITS[held_out]] += size + 2
        if read <= SMALL_BYTES:
            kept.append((text, held_out))
        elif read > read_at_most:
            return
    _check_splits(config, {split: most[split] > 0 for split in SPLITS})
    if read <= SMALL_BYTES:
        if tokenizer is None:
            sample = (text for text, held_out in kept if not held_out)
            tokenizer = train_bpe(sample, shape.vocab_size)
        for number, split in enumerate(SPLITS):
            tokens = tokenizer.encode([text for text, held_out in kept if held_out == number])
            most[split] = sum(len(document) for document in tokens)
    found = f" ({line})" if (line := tally.left_out_line()) else ""  # perhaps the cause
    for split in SPLITS:
        check_length(split, most[split], shape.sequence_length, data.corpus + found)


def _recall(manifest: Manifest) -> None:
    """Say what a preparation left out, since whoever trains on it may not have prepared it."""
    line = manifest.reading.left_out_line() if manifest.reading else ""
    if line:
        _say(f"{manifest.corpus}: {line}")


def _say(line: str) -> None:
    """Show a line about the corpus on standard error."""
    print(f"data: {line}", file=sys.stderr, flush=True)


def _is_occupied(folder: Path) -> bool:
    """Whether something is there that a rename would not replace: anything but an empty folder."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _check_splits(config: RunConfig, has_documents: dict[str, bool]) -> None:
    for split in SPLITS:
        if not has_documents[split]:
            raise ConfigError(
                f"data.validation_fraction: got {config.data.validation_fraction}, which leaves "
                f"no {split} document; accepted: a corpus of more, different documents, or "
                f"another fraction (corpus {config.data.corpus})"
            )


def _write(
    config: RunConfig,
    corpus: Corpus,
    tokenizer: DocumentTokenizer | None,
    folder: Path,
    progress: ShowBytes,
) -> None:
    """Fill ``folder``; the manifest is written last."""
    name, fraction = corpus.name, config.data.validation_fraction
    identity = fingerprint(config)  # before reading: files that change meanwhile make a new one
    if tokenizer is None:
        progress(f"training a tokenizer on {name}", 0, None)
        sample = training_sample(corpus, fraction)
        tokenizer = train_bpe(sample, transformer_shape(config).vocab_size)
        del sample
    tokenizer.save(folder / TOKENIZER)
    entries = tokenizer.entries
    dtype = indexed_dataset().DType.optimal_dtype(entries)
    documents = dict.fromkeys(SPLITS, 0)
    tokens = dict.fromkeys(SPLITS, 0)
    text_bytes = dict.fromkeys(SPLITS, 0)
    tally = Tally()
    with contextlib.ExitStack() as stack:
        builders: dict[str, Any] = {}
        for split in SPLITS:
            path = str(folder / f"{split}.bin")
            builders[split] = indexed_dataset().IndexedDatasetBuilder(path, dtype=dtype)
            stack.callback(builders[split].data_file.close)
        total = corpus.size()
        stage = f"tokenizing {name}"
        progress(stage, 0, total)
        for split, row, size in _tokenized(corpus.documents(tally), tokenizer, fraction):
            builders[split].add_document(row, [len(row)])
            documents[split] += 1
            tokens[split] += len(row)
            text_bytes[split] += size
            done = sum(text_bytes.values())  # more than the size on disk where compressed
            progress(stage, done, total if total and done <= total else None)
        _check_splits(config, {split: documents[split] > 0 for split in SPLITS})
        for split in SPLITS:
            builders[split].finalize(str(folder / f"{split}.idx"))
    files = [folder / f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx")]
    manifest = Manifest(
        format=FORMAT,
        fingerprint=identity,
        corpus=config.data.corpus,
        tokenizer=config.data.tokenizer,
        vocab_size=entries,
        end_of_document=tokenizer.end_of_document,
        dtype=dtype.__name__,
        splits={
            split: SplitCounts(
                documents[split], tokens[split], text_bytes[split], _sha256(folder / f"{split}.bin")
            )
            for split in SPLITS
        },
        files={path.name: path.stat().st_size for path in files},
        reading=tally,
        revision=corpus.revision,
        tokenizer_revision=tokenizer.revision,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _tokenized(
    documents: Iterable[str], tokenizer: DocumentTokenizer, fraction: float
) -> Iterator[tuple[str, np.ndarray, int]]:
    """The split, the tokens and the number of bytes of each document, in the order of the
    corpus."""
    batch: list[tuple[str, bool]] = []
    sizes: list[int] = []
    waiting = 0

    def flush() -> Iterator[tuple[str, np.ndarray, int]]:
        rows = tokenizer.encode([text for text, _ in batch])
        for (_, held_out), row, size in zip(batch, rows, sizes, strict=True):
            yield SPLITS[held_out], row, size
        batch.clear()
        sizes.clear()

    for text, held_out in split_documents(documents, fraction):
        batch.append((text, held_out))
        sizes.append(len(text.encode()))
        waiting += sizes[-1]
        if waiting >= BATCH_BYTES:
            yield from flush()
            waiting = 0
    yield from flush()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(temporary: Path, folder: Path) -> None:
    """Give a complete folder its name, durably; where another folder already has it, keep that
    one."""
    for path in [*temporary.rglob("*"), temporary]:
        fsync_path(path)
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        read_manifest(folder)
        return
    fsync_path(folder.parent)


def _remove_stale(folder: Path) -> None:
    """Remove what killed preparations of ``folder`` have left; a live one writes all the time."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in [left, *left.rglob("*")])
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
