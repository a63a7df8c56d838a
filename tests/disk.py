"""A disk that is really full: a small one of its own where this user may mount one, else a limit
on the size of files."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZE = 16 << 20


class Disk:
    """A folder that can be filled."""

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder, self._mounted = folder, mounted
        self.words = os.strerror(errno.ENOSPC if mounted else errno.EFBIG)
        """What the operating system says of a write to it while it is full."""

    @contextlib.contextmanager
    def full(self, free: int = 0) -> Iterator[Any]:
        """Meanwhile it takes ``free`` bytes more (of each file, where there is a limit alone).
        Yields what :meth:`tests.jobs.Jobs.run` has to ``prepare`` for that."""
        if self._mounted:
            filler = self.folder / "filler"
            taken = os.statvfs(self.folder)
            with open(filler, "wb") as file:
                file.write(bytes(max(0, taken.f_bavail * taken.f_bsize - free)))
            try:
                yield None
            finally:
                filler.unlink(missing_ok=True)
        else:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            limit_files(max(free, 4096))
            try:
                yield (__name__, "limit_files", (max(free, 4096),))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limit_files(size: int) -> None:
    """From now on this process cannot write beyond so many bytes of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A :class:`Disk` in ``folder``, which is made."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield Disk(folder, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
