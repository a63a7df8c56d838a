"""Writing files that matter: to a temporary name, flushed to disk, then renamed."""

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
"""The errors of a disk that is full, of a quota or a limit that is reached, and of a device that
fails."""


class WriteFailed(OSError):
    """The disk is full or fails; the message says what was being written, and where."""


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Say what was being written when the disk fails: a failed write does not know its path.

    Args:
        what: what is being written, as "saving step 4 to runs/a".

    Raises:
        WriteFailed: the disk is full or fails. Any other error is passed on as it is.
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
    """The disk's error that is the cause of another error, also through a library that does not
    pass it on as it was; None where no error of the disk is the cause."""
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
    """The disk's words in the text of an error; None where there are none."""
    return next((os.strerror(n) for n in _OF_THE_DISK if os.strerror(n) in text), None)


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of ``path`` by ``text``; a reader sees the old or the new content, never
    a part.

    Raises:
        WriteFailed: the disk is full or fails; the old content stays.
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
    """Nested values with null in place of the numbers that JSON does not have: NaN and the
    infinities."""
    if isinstance(value, dict):
        return {key: finite_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(values: dict[str, Any], indent: int | None = None) -> str:
    """``values`` as JSON that any reader accepts: a number that is not finite becomes null."""
    return json.dumps(finite_values(values), indent=indent, allow_nan=False)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace the content of ``path`` by an indented JSON object (:func:`json_text`)."""
    write_atomically(path, json_text(values, indent=2) + "\n")
