"""Writes that matter: to a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``; a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_path(path.parent)


def finite_values(value: Any) -> Any:
    """Nested values with null for numbers that JSON has none for: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: finite_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(values: dict[str, Any], indent: int | None = None) -> str:
    """``values`` as JSON that any reader takes: a number that is not finite is null."""
    return json.dumps(finite_values(values), indent=indent, allow_nan=False)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace ``path`` by an indented JSON object (:func:`json_text`)."""
    write_atomically(path, json_text(values, indent=2) + "\n")
