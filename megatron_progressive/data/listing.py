"""The files of a folder, followed through links, and what is left out of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_progressive.data.decoding import not_allowed
from megatron_progressive.data.tally import (
    HIDDEN,
    LINK_ABOVE,
    LINK_TO_NOTHING,
    LINKED_AGAIN,
    NO_REGULAR_FILE,
)


@dataclass(frozen=True)
class Listing:
    """The files that were found in a folder, and what was left out."""

    files: list[Path]
    """The files, sorted by their path in the folder."""
    left_out: list[tuple[str, Path]]
    """The path and the reason (one of :mod:`.tally`) of what was left out, as (reason, path)."""
    folders: list[Path]
    """The folder itself, and the folders outside of it to which links lead."""


def list_files(root: Path, skipped: Collection[str] = ()) -> Listing:
    """The files in ``root``, or ``root`` itself where it is a file.

    Links to folders are followed, after all that is in ``root`` itself; a folder that was visited,
    or that holds ``root``, is not visited again. Hidden files and folders are left out.

    Args:
        root: a file or folder that exists.
        skipped: names of folders to pass over in silence.

    Raises:
        ConfigError: a file or folder may not be read.
    """
    if root.is_file():
        return Listing([root], [], [])
    files: list[Path] = []
    left_out: list[tuple[str, Path]] = []
    folders = [root]
    above = {_identity(folder) for folder in root.resolve().parents}
    visited: set[tuple[int, int]] = set()
    inside, linked = [root], list[Path]()  # folders to visit: links wait until the others are done
    while inside or linked:
        if inside:
            folder = inside.pop()
        else:
            linked.sort(reverse=True)  # what is read does not depend on the order of a listing
            folder = linked.pop()
            identity = _identity(folder)
            if identity in visited or identity in above:
                left_out.append((LINKED_AGAIN if identity in visited else LINK_ABOVE, folder))
                continue
            folders.append(folder.resolve())
        visited.add(_identity(folder))
        for entry in _entries(folder):
            path = folder / entry.name
            if entry.name in skipped and entry.is_dir():
                continue
            if entry.name.startswith("."):
                left_out.append((HIDDEN, path))
                continue
            try:
                mode = path.stat().st_mode
            except PermissionError:
                raise not_allowed(path) from None
            except OSError:  # of a link that leads nowhere, or in a circle
                left_out.append((LINK_TO_NOTHING, path))
                continue
            if stat.S_ISDIR(mode):
                (linked if entry.is_symlink() else inside).append(path)
            elif not stat.S_ISREG(mode):
                left_out.append((NO_REGULAR_FILE, path))
            elif not os.access(path, os.R_OK, effective_ids=True):
                raise not_allowed(path)
            else:
                files.append(path)

    def place(path: Path) -> str:
        return path.relative_to(root).as_posix()

    left_out.sort(key=lambda item: place(item[1]))
    return Listing(sorted(files, key=place), left_out, folders)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except PermissionError:
        raise not_allowed(folder) from None


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino
