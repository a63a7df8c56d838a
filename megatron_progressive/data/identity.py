"""What a run is trained on, by content: which text, split and tokenizer, or which pictures.

Names do not tell: a file of the same name may hold other text tomorrow. The identity of a run's
data is kept in its folder (:data:`DATA_FILE`) and in every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data import image_folder, shapes
from megatron_progressive.data.manifest import SPLITS, TOKENIZER, prepared_error, read_manifest

DATA_FILE = "data.json"
"""In a run folder: the :class:`DataIdentity` of what it is trained on."""

CONTENT_BYTES = 1 << 30
"""Of an image folder: up to so many bytes its files are read to identify it; of a larger one their
names and sizes alone count."""

_NOT_TOKENS = ("padding", "truncation")  # of tokenizer.json: how batches are made of tokens


@dataclass(frozen=True)
class DataIdentity:
    """What a run is trained on."""

    fingerprint: str
    """Hash (40 hex digits) of the content: all tokens of both splits and the tokenizer, or all
    pictures and their classes. Equal where the content is, whatever it is called."""
    corpus: str
    """``data.corpus`` that it was made from."""
    tokenizer: str | None = None
    """SHA-256 of the tokenizer; None of images."""
    prepared: str | None = None
    """Absolute path of the prepared corpus that it was read from; None of images."""

    def to_values(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Any) -> DataIdentity | None:
        """The inverse of :meth:`to_values`; None where it is no identity."""
        if not isinstance(values, dict):
            return None
        own = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if not all(isinstance(own.get(key), str) for key in ("fingerprint", "corpus")):
            return None
        return cls(**own)


def differ(one: DataIdentity | None, other: DataIdentity | None) -> bool:
    """Whether two runs are known to be trained on different data."""
    return one is not None and other is not None and one.fingerprint != other.fingerprint


def read_identity(file: Path) -> DataIdentity | None:
    """The identity in a file; None where there is none that can be read: it is unknown."""
    try:
        return DataIdentity.from_values(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def prepared_identity(folder: Path) -> DataIdentity:
    """The identity of a prepared corpus.

    Raises:
        ConfigError: it is not there or not whole.
    """
    manifest = read_manifest(folder)
    file = folder / TOKENIZER / "tokenizer.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise prepared_error(folder, f"whose {TOKENIZER}/{file.name} cannot be read") from None
    tokenizer = _digest({key: content[key] for key in content if key not in _NOT_TOKENS})
    splits = {split: manifest.splits[split].sha256 for split in SPLITS}
    return DataIdentity(
        fingerprint=_digest({**splits, "tokenizer": tokenizer})[:40],
        corpus=manifest.corpus,
        tokenizer=tokenizer,
        # links stay: where they lead to may have another name on another host
        prepared=os.path.abspath(folder),
    )


def image_identity(config: RunConfig, num_classes: int) -> DataIdentity:
    """The identity of a run's images.

    Raises:
        ConfigError: no such folder, or one that does not fit the model.
    """
    corpus = config.data.corpus
    if corpus == shapes.NAME:
        return DataIdentity(_digest([shapes.NAME])[:40], corpus)
    folder, root = image_folder.open_folder(corpus, num_classes), Path(corpus)
    files = [path for split in folder.files.values() for path in split]
    try:
        sizes = [path.stat().st_size for path in files]
        with_content = sum(sizes) <= CONTENT_BYTES
        listing = [
            [
                path.relative_to(root).as_posix(),
                size,
                hashlib.sha256(path.read_bytes()).hexdigest() if with_content else None,
            ]
            for path, size in zip(files, sizes, strict=True)
        ]
    except OSError as error:
        raise ConfigError(
            f"data.corpus: got {corpus}, whose {error.filename} cannot be read ({error.strerror});"
            " accepted: files that can be read"
        ) from None
    return DataIdentity(_digest(listing)[:40], corpus)
