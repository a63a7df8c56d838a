"""Tokens that Megatron-LM or Bridge has written, trained on where they lie.

``data.corpus: megatron:PREFIX[,PREFIX…]`` names ``PREFIX.bin`` and ``PREFIX.idx``. Nothing is
copied: the prepared corpus is a list of pieces of these files for each split. The split is that of
the text, which the tokenizer gives back, so that it is the one of a preparation from that text.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data.manifest import (
    IN_PLACE,
    MANIFEST,
    PIECES,
    SPLITS,
    TOKENIZER,
    Manifest,
    SourceFile,
    SplitCounts,
    decides,
    fingerprint_of,
)
from megatron_progressive.data.megatron import indexed_dataset
from megatron_progressive.data.merge import check_splits
from megatron_progressive.data.split import Splitter
from megatron_progressive.data.tokenizer import DocumentTokenizer, load_tokenizer
from megatron_progressive.models import transformer_shape
from megatron_progressive.runtime.progress import ShowBytes

_BATCH_TOKENS = 1 << 18


@dataclass(frozen=True)
class Indexed:
    """The documents of one pair of files."""

    file: Path
    """The ``.bin`` file."""
    dtype: np.dtype[Any]
    ends: NDArray[np.int64]
    """The number of tokens up to the end of each document."""


def open_indexed(prefix: str) -> Indexed:
    """The documents of ``prefix``.bin and ``prefix``.idx.

    Raises:
        ConfigError: a file is missing or damaged, or they do not fit each other.
    """
    bin_file, idx_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for file in (bin_file, idx_file):
        if not file.is_file():
            raise _error(prefix, f"of which {file} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not determine rank")
            index = indexed_dataset().IndexedDataset(prefix, mmap=True).index
        lengths = index.sequence_lengths.astype(np.int64)
        pointers = index.sequence_pointers.astype(np.int64)
        documents = index.document_indices.astype(np.int64)
        dtype = np.dtype(index.dtype)
    except Exception as error:  # the reader asserts, and reads what is not there
        raise _error(prefix, f"whose {idx_file.name} cannot be read ({error})") from None
    ends = np.concatenate([[0], np.cumsum(lengths)])
    size = bin_file.stat().st_size
    if ends[-1] * dtype.itemsize != size or (pointers != ends[:-1] * dtype.itemsize).any():
        raise _error(
            prefix,
            f"whose {idx_file.name} tells {ends[-1] * dtype.itemsize} bytes of tokens in a row "
            f"while {bin_file.name} has {size}",
        )
    fits = len(documents) and documents[0] == 0 and documents[-1] == len(lengths)
    if not fits or (np.diff(documents) < 0).any() or not np.issubdtype(dtype, np.integer):
        raise _error(prefix, f"whose {idx_file.name} has no documents of token numbers")
    return Indexed(bin_file, dtype, ends[documents[1:]])


def _error(prefix: str, why: str) -> ConfigError:
    why = " ".join(why.split())
    return ConfigError(
        f"data.corpus: got megatron:{prefix}, {why}; accepted: megatron:PREFIX, with PREFIX.bin "
        "and PREFIX.idx as Megatron writes them"
    )


def tokenizer_of(config: RunConfig) -> DocumentTokenizer:
    """The tokenizer that the tokens are of.

    Raises:
        ConfigError: ``data.tokenizer`` does not name one.
    """
    tokenizer = load_tokenizer(config.data, transformer_shape(config).vocab_size)
    if tokenizer is None:
        raise ConfigError(
            f"data.tokenizer: got 'bpe' with {config.data.corpus}; accepted: the tokenizer that "
            "made it"
        )
    return tokenizer


def open_all(config: RunConfig) -> list[Indexed]:
    """All pairs of files of the corpus.

    Raises:
        ConfigError: see :func:`open_indexed`; or their tokens are of different types.
    """
    opened = [open_indexed(prefix) for prefix in prefixes(config.data.corpus)]
    for one in opened[1:]:
        if one.dtype != opened[0].dtype:
            raise _error(
                str(one.file).removesuffix(".bin"),
                f"whose tokens are {one.dtype}, those before {opened[0].dtype}",
            )
    return opened


def prefixes(corpus: str) -> list[str]:
    """The prefixes that ``data.corpus`` names."""
    return [prefix.strip() for prefix in corpus.removeprefix("megatron:").split(",")]


def fill(config: RunConfig, folder: Path, tell: ShowBytes) -> list[str]:
    """Fill the empty ``folder`` with a prepared corpus whose tokens stay where they are; returns
    lines for the user.

    Raises:
        ConfigError: the files or the tokenizer do not fit each other, or a split has no document.
    """
    identity = fingerprint_of(decides(config))
    tokenizer, files = tokenizer_of(config), open_all(config)
    splitter = Splitter(config.data.validation_fraction, bool(config.data.validation_near))
    pieces: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    counts = {split: [0, 0, 0] for split in SPLITS}
    maps = [np.memmap(one.file, one.dtype, "r") if len(one.ends) else None for one in files]
    open_ended = 0
    total = sum(one.file.stat().st_size for one in files)
    places: list[tuple[int, int, int]] = []

    def documents() -> Iterator[tuple[str, int]]:
        """Each document's text, and its number in ``places``."""
        for number, one in enumerate(files):
            begin, batch = 0, list[NDArray[Any]]()
            for end in one.ends.tolist():
                places.append((number, begin, end - begin))
                tokens = maps[number]
                assert tokens is not None
                batch.append(tokens[begin:end])
                begin = end
                if sum(map(len, batch)) >= _BATCH_TOKENS:
                    yield from decoded(batch)
                    batch = []
            yield from decoded(batch)

    def decoded(batch: list[NDArray[Any]]) -> Iterator[tuple[str, int]]:
        nonlocal open_ended
        first = len(places) - len(batch)
        rows = []
        for place, row in enumerate(batch, first):
            if len(row) and not 0 <= row.min() <= row.max() < tokenizer.entries:
                raise _error(
                    str(files[places[place][0]].file).removesuffix(".bin"),
                    f"with token {row.max()}, which {config.data.tokenizer} does not have",
                )
            ended = len(row) > 0 and row[-1] == tokenizer.end_of_document
            open_ended += not ended
            rows.append((row[:-1] if ended else row).tolist())
        texts = tokenizer.backend.decode_batch(rows, skip_special_tokens=False)
        return zip(texts, range(first, first + len(batch)), strict=True)

    done = 0
    for text, number, held_out in splitter.split(documents()):
        split = SPLITS[held_out]
        file, first, tokens = places[number]
        if not tokens:
            continue
        content = maps[file][first : first + tokens]  # type: ignore[index]
        hashes[split].update(content.tobytes())
        mine = pieces[split]
        if mine and mine[-1][0] == file and mine[-1][1] + mine[-1][2] == first:
            mine[-1][2] += tokens
        else:
            mine.append([file, first, tokens])
        for at, more in enumerate((1, tokens, len(text.encode(errors="replace")))):
            counts[split][at] += more
        done += content.nbytes
        tell("reading the tokens", done, total)
    check_splits(config, {split: counts[split][0] > 0 for split in SPLITS})
    tokenizer.save(folder / TOKENIZER)
    for split in SPLITS:
        np.save(folder / f"{split}.{PIECES}", np.array(pieces[split], dtype=np.int64))
    manifest = Manifest(
        format=IN_PLACE,
        fingerprint=identity,
        corpus=config.data.corpus,
        tokenizer=config.data.tokenizer,
        vocab_size=tokenizer.entries,
        end_of_document=tokenizer.end_of_document,
        dtype=files[0].dtype.name,
        splits={s: _counts(counts[s], hashes[s].hexdigest()) for s in SPLITS},
        files={f"{s}.{PIECES}": (folder / f"{s}.{PIECES}").stat().st_size for s in SPLITS},
        tokenizer_revision=tokenizer.revision,
        sources=[SourceFile.of(one.file) for one in files],
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    if not open_ended:
        return []
    return [
        f"{open_ended:,} of {len(places):,} documents do not end with "
        f"{tokenizer.backend.id_to_token(tokenizer.end_of_document)}; they are taken as they are"
    ]


def _counts(counts: list[int], sha256: str) -> SplitCounts:
    documents, tokens, text_bytes = counts
    return SplitCounts(documents, tokens, text_bytes, sha256)
