"""A folder that appears under its name once all of it is on disk, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_progressive.config import ConfigError
from megatron_progressive.config.places import check_writable
from megatron_progressive.runtime.files import fsync_path, writing


def check_new_folder(out: Path, nbytes: int) -> None:
    """Raise :class:`ConfigError` where ``out`` exists, has no folder to be in, or lacks room for
    ``nbytes``."""
    if os.path.lexists(out):
        raise ConfigError(f"out: {out} is there; accepted: a folder that is not there yet")
    if not out.parent.is_dir():
        raise ConfigError(
            f"out: no folder {out.parent}; accepted: a name in a folder that is there"
        )
    check_writable("out", out, added=len(_hidden(out).name) - len(out.name))
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise ConfigError(
            f"out: {nbytes / 1e9:.1f} GB do not fit on {out.parent}; accepted: a folder with "
            f"more than its {free / 1e9:.1f} GB free"
        )


def _hidden(out: Path) -> Path:
    return out.with_name(f".{out.name}.tmp")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` to write to, which becomes ``out`` at the end.

    An error removes the hidden folder. Whoever writes to it flushes the files.

    Raises:
        WriteFailed: the disk is full or fails.
    """
    temporary = _hidden(out)
    shutil.rmtree(temporary, ignore_errors=True)  # of a command that was killed
    with writing(f"writing {out}"):
        temporary.mkdir()
        try:
            yield temporary
            for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
                fsync_path(folder)
            os.rename(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(out.parent)
