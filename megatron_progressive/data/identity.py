"""What a run is trained on, by content: which text, split and tokenizer, or which pictures.

A name does not tell, since a file of the same name may hold other text tomorrow. The identity of a
run's data is kept in its folder (:data:`DATA_FILE`) and in every checkpoint.
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
"""The file in a run folder with the :class:`DataIdentity` of what the run is trained on."""

CONTENT_BYTES = 1 << 30
"""Up to how many bytes the files of an image folder are read to identify it; in a larger folder
only their names and sizes count."""

_NOT_TOKENS = ("padding", "truncation")  # of tokenizer.json: how batches are made of tokens


@dataclass(frozen=True)
class DataIdentity:
    """The content that a run is trained on."""

    fingerprint: str
    """Hash (40 hex digits) of the content: of all tokens of both splits and the tokenizer, or of
    all pictures and their classes. It is equal where the content is, whatever the name."""
    corpus: str
    """The ``data.corpus`` that the data was made from."""
    tokenizer: str | None = None
    """SHA-256 of the tokenizer; None for images."""
    prepared: str | None = None
    """Absolute path of the prepared corpus that the data was read from; None for images."""

    def to_values(self) -> dict[str, Any]:
        """The identity as JSON has it."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Any) -> DataIdentity | None:
        """The identity that :meth:`to_values` gave these values of; None where they are no
        identity."""
        if not isinstance(values, dict):
            return None
        own = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if not all(isinstance(own.get(key), str) for key in ("fingerprint", "corpus")):
            return None
        return cls(**own)


def differ(one: DataIdentity | None, other: DataIdentity | None) -> bool:
    """Whether two runs are known to have been trained on different data."""
    return one is not None and other is not None and one.fingerprint != other.fingerprint


def read_identity(file: Path) -> DataIdentity | None:
    """The identity in a file; None where no identity can be read there, so that it is unknown."""
    try:
        return DataIdentity.from_values(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def prepared_identity(folder: Path) -> DataIdentity:
    """The identity of a prepared corpus.

    Raises:
        ConfigError: the corpus is not there or not whole.
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
        ConfigError: there is no such folder, or it does not fit the model.
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
