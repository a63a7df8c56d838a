"""What a prepared corpus is, and whether one on disk is whole and fits the model.

A prepared corpus is a folder with ``train.bin/.idx`` and ``validation.bin/.idx`` (Megatron's
indexed dataset), ``tokenizer/`` and ``manifest.json``, which is what makes it one. A large one has
parts, ``train-000000.bin/.idx`` and so on, whose tokens follow each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data.corpus import open_corpus
from megatron_progressive.data.stream import Piece
from megatron_progressive.data.tally import Tally, counted, readable_bytes
from megatron_progressive.data.tokenizer import check_vocabulary, identity
from megatron_progressive.models import transformer_shape

FORMAT = 2
"""The format of prepared corpora; raise this number when the same configuration would give other
tokens."""

IN_PARTS = 3
"""The format of the same tokens in parts, which versions that know format 2 alone cannot read."""

IN_PLACE = 4
"""The format of tokens in files of somebody else (see :mod:`.in_place`)."""

READABLE_FORMATS = (1, FORMAT, IN_PARTS, IN_PLACE)
"""The formats whose files are read as they are. The first one split by the exact text and had no
tally."""

MANIFEST = "manifest.json"
SOURCES = "sources.json"
"""The file that remembers the identity of Python sources."""
TOKENIZER = "tokenizer"
"""The folder of the tokenizer in a prepared corpus."""
PIECES = "pieces.npy"
"""The ending of the files that say where the tokens of a split are in files of somebody else, as
int64 [pieces, 3]: the number of the file, that of the first token in it, and how many."""
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class SplitCounts:
    """The counts of one split of a prepared corpus."""

    documents: int
    tokens: int
    """Number of tokens, including the one that ends each document."""
    text_bytes: int
    """Number of bytes of UTF-8 text before tokenization."""
    sha256: str
    """SHA-256 of the ``.bin`` file; of the parts' own ones where there are several."""


@dataclass(frozen=True)
class PartCounts:
    """The counts of one part of a split."""

    name: str
    """The name of its files without ``.bin`` and ``.idx``."""
    documents: int
    tokens: int


@dataclass(frozen=True)
class SourceFile:
    """A file of somebody else, as it was."""

    path: str
    """Its absolute path."""
    bytes: int
    changed: int
    """When it was last changed, in nanoseconds."""

    @classmethod
    def of(cls, file: Path) -> SourceFile:
        """A file as it is now."""
        stat = file.stat()
        return cls(os.path.abspath(file), stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``."""

    format: int
    fingerprint: str
    """Hash of everything that decides the content (see :func:`fingerprint`)."""
    corpus: str
    """The ``data.corpus`` that the corpus was made from."""
    tokenizer: str
    """The ``data.tokenizer`` that it was made with."""
    vocab_size: int
    """Number of entries of the tokenizer."""
    end_of_document: int
    """The token that ends each document."""
    dtype: str
    """NumPy's name of the type of a token on disk."""
    splits: dict[str, SplitCounts]
    files: dict[str, int]
    """The size in bytes of each ``.bin`` and ``.idx`` file."""
    reading: Tally | None = None
    """What of the corpus was read, left out and mended; None where an earlier version made the
    corpus."""
    revision: str | None = None
    """Commit of the Hugging Face data set that was read; None for other corpora, or where it is not
    known."""
    tokenizer_revision: str | None = None
    """Commit of the Hugging Face tokenizer; None for other tokenizers, or where it is not known."""
    parts: dict[str, list[PartCounts]] | None = None
    """The parts of each split in their order; None where each split is one ``.bin`` file."""

    sources: list[SourceFile] | None = None
    """The ``.bin`` files in which the tokens are, where these are not in the folder."""

    def pieces(self, folder: Path, split: str) -> list[Piece]:
        """Where the tokens of a split are; ``folder`` is that of the prepared corpus."""
        if self.sources is not None:
            files = [Path(source.path) for source in self.sources]
            rows = np.load(folder / f"{split}.{PIECES}").tolist()
            return [Piece(files[file], first, tokens) for file, first, tokens in rows]
        if self.parts is None:
            return [Piece(folder / f"{split}.bin", 0, self.splits[split].tokens)]
        return [Piece(folder / f"{part.name}.bin", 0, part.tokens) for part in self.parts[split]]

    def summary(self) -> list[str]:
        """The lines for the user: documents, text and tokens of each split, and what was read."""
        whole = [
            f"{name}: {counted(split.documents, 'document')}, {readable_bytes(split.text_bytes)}, "
            f"{counted(split.tokens, 'token')}"
            for name, split in self.splits.items()
        ]
        return ["; ".join(whole), *(self.reading.lines() if self.reading else [])]

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        values = asdict(self)
        for key in ("parts", "sources"):
            if values[key] is None:
                del values[key]  # as in format 2
        return json.dumps(values, indent=2) + "\n"


def decides(config: RunConfig) -> dict[str, Any]:
    """All that decides a prepared corpus, as JSON can hold it, by the field of ``data`` that says
    it; the sequence length is not part of it.

    Raises:
        ConfigError: the corpus or the tokenizer is missing.
    """
    data = config.data
    values = {
        "format": FORMAT,
        "corpus": open_corpus(data).identity(_known_sources(config)),
        "tokenizer": identity(data, transformer_shape(config).vocab_size),
        "text_field": data.text_field,
        "validation_fraction": data.validation_fraction,
        "max_bytes": data.max_bytes,
    }
    if data.validation_near:  # not in earlier versions
        values["validation_near"] = True
    return values


def _known_sources(config: RunConfig) -> dict[str, list[Any]]:
    """The identities of Python sources that preparations beside the run have found, by
    :meth:`.Corpus.seen`: to read all of them again takes seconds, in each process."""
    known: dict[str, list[Any]] = {}
    if open_corpus(config.data).is_sources:
        for file in (Path(config.run.dir) / "data").glob(f"*/{SOURCES}"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                values = json.loads(file.read_text(encoding="utf-8"))
                known[values["seen"]] = values["identity"]
    return known


def fingerprint_of(values: dict[str, Any]) -> str:
    """The hash (40 hex digits) of what :func:`decides` gives."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:40]


def fingerprint(config: RunConfig) -> str:
    """A hash (40 hex digits) of all that decides a prepared corpus (see :func:`decides`)."""
    return fingerprint_of(decides(config))


def prepared_folder(config: RunConfig) -> Path:
    """The folder where the prepared corpus is, or is to be: ``data.prepared``, or a folder in
    ``run.dir/data`` whose name tells the corpus and its fingerprint.

    Raises:
        ConfigError: ``data.prepared`` is not set, and the corpus or the tokenizer is missing or
            ``run.dir`` is inside the corpus.
    """
    if config.data.prepared is not None:
        return Path(config.data.prepared)
    corpus, parent = open_corpus(config.data), Path(config.run.dir) / "data"
    for folder in corpus.listing().folders:
        if parent.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(  # what the run writes would change the corpus
                f"run.dir: got {config.run.dir}, inside corpus {config.data.corpus}; accepted: a "
                "folder outside of it"
            )
    return parent / f"{corpus.name}-{fingerprint(config)[:10]}"


def prepared_error(folder: Path, why: str) -> ConfigError:
    """The error that says that a folder is not a prepared corpus, and why."""
    return ConfigError(
        f"data.prepared: got {folder}, {why}; accepted: a folder that `mprog data prepare` "
        "made (delete this one to make it again)"
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared corpus, once the sizes of its files have been checked.

    Raises:
        ConfigError: there is no manifest, its format is another one, or a file is missing or cut
            short.
    """
    error = partial(prepared_error, folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise error(f"which has no {MANIFEST}" if folder.exists() else "which does not exist")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] not in READABLE_FORMATS:
            accepted = ", ".join(map(str, READABLE_FORMATS))
            raise error(f"of format {values['format']} (this version reads {accepted})")
        values["splits"] = {name: SplitCounts(**values["splits"][name]) for name in SPLITS}
        if values.get("reading") is not None:
            values["reading"] = Tally.from_json(values["reading"])
        if values.get("parts") is not None:
            parts = values["parts"]
            values["parts"] = {s: [PartCounts(**part) for part in parts[s]] for s in SPLITS}
        if values.get("sources") is not None:
            values["sources"] = [SourceFile(**source) for source in values["sources"]]
        manifest = Manifest(**values)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError):
        raise error(f"whose {MANIFEST} is damaged") from None
    for name, size in manifest.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found is None:
            raise error(f"which lacks {name}")
        if found != size:
            raise error(f"whose {name} has {found} bytes instead of {size}")
    for source in manifest.sources or ():
        if not Path(source.path).is_file():
            raise error(f"whose tokens were in {source.path}, which does not exist")
        if SourceFile.of(Path(source.path)) != source:
            raise error(f"whose tokens are in {source.path}, which has changed since")
    return manifest


def check_fit(config: RunConfig, manifest: Manifest) -> None:
    """Raise :class:`ConfigError` where the model cannot be trained on a prepared corpus: where its
    vocabulary is smaller than the tokenizer's, or a split is shorter than one sample."""
    shape = transformer_shape(config)
    check_vocabulary(shape.vocab_size, manifest.vocab_size, manifest.tokenizer)
    for split in SPLITS:
        tokens = manifest.splits[split].tokens
        check_length(split, tokens, shape.sequence_length, manifest.corpus)


def check_length(split: str, tokens: int, sequence_length: int, corpus: str) -> None:
    """Raise :class:`ConfigError` where ``tokens`` are fewer than a sample takes, which is one more
    than ``sequence_length`` because the last token is only a target."""
    if tokens <= sequence_length:
        more = ", or a larger data.validation_fraction" if split == "validation" else ""
        raise ConfigError(
            f"data.sequence_length: got {sequence_length}; accepted: at most {tokens - 1} (the "
            f"{split} split of {corpus} has {tokens} tokens), a longer corpus{more}"
        )
