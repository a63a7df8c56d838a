"""Writes that matter: to a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""No space, over a quota or a limit, or a device that fails."""


class WriteFailed(OSError):
    """The disk is full or fails; the message says what was being written, and where."""


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Give an error of the disk the words that it lacks: a failed write knows no path.

    Args:
        what: as in "while saving step 4 to runs/a".

    Raises:
        WriteFailed: the disk is full or fails. Any other error is left as it is.
    """
    try:
        yield
    except WriteFailed:
        raise
    except Exception as error:
        cause = error_of_the_disk(error)
        if cause is None:
            raise
        raise WriteFailed(f"{cause} while {what}") from error


def error_of_the_disk(error: BaseException) -> str | None:
    """What the disk said, where it is the cause of an error, also through a library that does not
    pass it on as it was; None where it is not."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            if seen.errno in _OF_THE_DISK:
                name = f" ({seen.filename})" if seen.filename else ""
                return f"{os.strerror(seen.errno)}{name}"
        elif (said := said_by_the_disk(str(seen))) is not None:
            return said
        seen = seen.__cause__ or seen.__context__
    return None


def said_by_the_disk(text: str) -> str | None:
    """The disk's words in an error's text; None where there are none."""
    return next((os.strerror(n) for n in _OF_THE_DISK if os.strerror(n) in text), None)


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``; a reader sees the old or the new one, never a part.

    Raises:
        WriteFailed: the disk is full or fails; the old one stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(f"writing {path}"):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)  # it takes room
            raise
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
