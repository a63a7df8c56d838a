"""Whether a checkpoint's files have the content that was saved; needs no torch.

``progress.json`` lists each file's size and SHA-256, and has a checksum of itself. Checkpoints of
earlier versions have sizes alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError

PROGRESS_FILE = "progress.json"

_OWN = "checksum"
"""The entry of ``progress.json`` with the SHA-256 of its other values."""
_THREADS = min(4, os.cpu_count() or 1)
"""The number of files that are read at once; hashing lets other threads run."""


class DamagedCheckpoint(ConfigError):
    """A checkpoint is not what was saved; the message says which file."""

    def __init__(self, checkpoint: Path, damage: str) -> None:
        super().__init__(
            f"checkpoint: {checkpoint} is damaged: {damage}; accepted: a whole checkpoint"
        )
        self.damage = damage


@dataclass(frozen=True)
class SavedFile:
    """One file as it was saved."""

    size: int
    """Its size in bytes."""
    sha256: str | None
    """Its hash (64 hex digits); None where it was saved before there were checksums."""


def sha256_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The hashes (64 hex digits) of files, by their names in ``folder``."""

    def one(name: str) -> tuple[str, str]:
        with open(folder / name, "rb") as file:
            return name, hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(threads.map(one, names))


def listed(files: Mapping[str, SavedFile]) -> dict[str, Any]:
    """The entries of ``progress.json`` that list files; :func:`read_listed` is the inverse."""
    return {
        "files": {name: file.size for name, file in files.items()},
        "sha256": {name: file.sha256 for name, file in files.items()},
    }


def with_own_checksum(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a ``progress.json``, with their checksum."""
    return {**values, _OWN: _checksum(values)}


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_listed(checkpoint: Path) -> tuple[dict[str, Any], dict[str, SavedFile]]:
    """The other values of a checkpoint's ``progress.json``, and the files that it lists.

    Raises:
        DamagedCheckpoint: ``progress.json`` is missing, cannot be read or is not what was written.
    """
    try:
        values: dict[str, Any] = json.loads((checkpoint / PROGRESS_FILE).read_text("utf-8"))
        own = values.pop(_OWN, None)
        as_saved = own is None or own == _checksum(values)
        hashes = values.pop("sha256", {})
        files = {
            name: SavedFile(size, hashes.get(name)) for name, size in values.pop("files").items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(checkpoint, f"{PROGRESS_FILE} is missing or not readable") from None
    if not as_saved:
        raise DamagedCheckpoint(checkpoint, _not_as_saved(PROGRESS_FILE))
    return values, files


def size_damage(checkpoint: Path, files: Mapping[str, SavedFile]) -> str | None:
    """The damage that sizes show: a file is missing, truncated, too long or of another checkpoint.
    None where there is none."""
    for name, file in files.items():
        path = checkpoint / name
        actual = path.stat().st_size if path.is_file() else None
        if actual is None:
            return f"{name} is missing"
        if actual != file.size:
            how = "is truncated to" if actual < file.size else "has"
            return f"{name} {how} {actual} of {file.size} bytes"
    # torch would read none of them, but two checkpoints in one folder are neither
    other = sorted(path.name for path in checkpoint.glob("*.distcp") if path.name not in files)
    return f"{other[0]} is not one of the files that were saved" if other else None


def content_damage(
    checkpoint: Path, files: Mapping[str, SavedFile], names: Collection[str] | None = None
) -> str | None:
    """The damage that checksums show, of the files ``names`` alone where these are given; None
    where there is none."""
    known = {
        name: file.sha256
        for name, file in files.items()
        if file.sha256 is not None and (names is None or name in names)
    }
    try:
        found = sha256_of(checkpoint, known)
    except OSError as error:
        return f"{Path(error.filename or '').name} cannot be read ({error.strerror})"
    return next((_not_as_saved(name) for name in known if found[name] != known[name]), None)


def _not_as_saved(name: str) -> str:
    return f"{name} does not have the content that was saved (checksum)"
