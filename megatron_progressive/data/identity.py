"""What a run is trained on, by content: which text, split and tokenizer, or which pictures.

A name does not tell, since a file of the same name may hold other text tomorrow. The identity of a
run's data is kept in its folder (:data:`DATA_FILE`) and in every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data.manifest import SPLITS, TOKENIZER, prepared_error, read_manifest
from megatron_progressive.data.mixture import whole_weights
from megatron_progressive.pictures import image_folder, shapes

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
    """Absolute path of the prepared corpus that the data was read from; None for images, and for a
    mixture, whose parts have theirs."""
    tokens: int | None = None
    """The number of tokens in the training split; None for images, for a mixture, and where an
    earlier version recorded it."""
    parts: tuple[DataIdentity, ...] = ()
    """The parts of a mixture, in the order of ``data.mix``."""
    further: tuple[tuple[str, DataIdentity], ...] = ()
    """The further validation sets, with their names. They are no part of :attr:`fingerprint`, since
    nothing is trained on them."""

    @property
    def validation(self) -> dict[str, DataIdentity]:
        """The further validation sets, by name."""
        return dict(self.further)

    @property
    def folders(self) -> list[Path]:
        """The prepared corpora of the training data: none for images, several for a mixture."""
        if self.parts:
            return [folder for part in self.parts for folder in part.folders]
        return [] if self.prepared is None else [Path(self.prepared)]

    @property
    def all_folders(self) -> list[Path]:
        """The prepared corpora of the training data and of the further validation sets."""
        return [*self.folders, *(f for _, one in self.further for f in one.folders)]

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder of the tokenizer, beside the tokens; None for images."""
        return self.folders[0] / TOKENIZER if self.folders else None

    def prepared_words(self) -> list[str]:
        """The ``key=value`` words that name this training data in a configuration."""
        if self.parts:
            return [f"data.mix.{n}.prepared={p.prepared}" for n, p in enumerate(self.parts)]
        return [f"data.prepared={self.prepared}"]

    def to_values(self) -> dict[str, Any]:
        """The identity as JSON has it, without what is not there."""
        values = asdict(self)
        values["parts"] = [part.to_values() for part in self.parts]
        values["further"] = {name: one.to_values() for name, one in self.further}
        return {k: v for k, v in values.items() if v or k not in ("tokens", "parts", "further")}

    @classmethod
    def from_values(cls, values: Any) -> DataIdentity | None:
        """The identity that :meth:`to_values` gave these values of; None where they are no
        identity."""
        if not isinstance(values, dict):
            return None
        own = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if not all(isinstance(own.get(key), str) for key in ("fingerprint", "corpus")):
            return None
        inner, sets = own.pop("parts", []), own.pop("further", {})
        if not isinstance(inner, list) or not isinstance(sets, dict):
            return None
        parts = [cls.from_values(part) for part in inner]
        sets = {name: cls.from_values(one) for name, one in sets.items()}
        if None in parts or None in sets.values():
            return None
        return cls(
            **own,
            parts=tuple(part for part in parts if part is not None),
            further=tuple((name, one) for name, one in sets.items() if one is not None),
        )


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
        tokens=manifest.splits[SPLITS[0]].tokens,
    )


def mixed_identity(config: RunConfig, parts: Sequence[DataIdentity]) -> DataIdentity:
    """The identity of a mixture of parts, which have one tokenizer: what its parts are, and with
    which weights and limits they are drawn."""
    mix = config.data.mix or []
    weights = whole_weights([part.weight for part in mix])
    drawn = zip(parts, weights, mix, strict=True)
    content = [[one.fingerprint, weight, part.epochs_at_most] for one, weight, part in drawn]
    return DataIdentity(
        fingerprint=_digest({"mix": content})[:40],
        corpus=mix_words(config),
        tokenizer=parts[0].tokenizer,
        parts=tuple(parts),
    )


def mix_words(config: RunConfig) -> str:
    """A mixture in words, as ``mix of a.jsonl (70 %) and b.jsonl (30 %)``."""
    mix = config.data.mix or []
    weights = whole_weights([part.weight for part in mix])
    each = [
        f"{part.corpus} ({100 * weight / sum(weights):.3g} %)"
        for part, weight in zip(mix, weights, strict=True)
    ]
    return "mix of " + " and ".join(each)


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
