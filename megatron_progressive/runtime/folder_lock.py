"""One job at a time in a folder, on any file system that several hosts share.

The lock is a small folder, for example ``.lock``, that holds one file. The file is named by a
random token and tells who owns the lock. Three operations, all of them atomic on local file systems
and on NFS, make it safe without ``flock``:

- *Taking* it renames a prepared folder to the lock's name. That works where nothing or an empty
  folder is there, and fails where another's file is in it: one of many takers wins.
- *Breaking* a dead owner's lock unlinks that owner's file, by its token: a lock that somebody else
  has taken meanwhile has another token, and is left alone.
- *Renewing* it sets its file's modification time, every :data:`HEARTBEAT_SECONDS`.

An owner is dead at once where it ran on this machine and its process is gone; else when its file
has not been renewed for :data:`STALE_SECONDS`, by the clock of the file system alone.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType

import psutil

LOCK_NAME = ".lock"
"""The name of the lock of a run folder, in that folder."""

HEARTBEAT_SECONDS = 10.0
"""The seconds between two signs of life of an owner."""

STALE_SECONDS = 120.0
"""After how many seconds without a sign of life an owner on another machine counts as dead. This is
longer than file systems keep what they know of a file (NFS: 60 s), and longer than a busy server
makes a job wait."""

_LEFTOVER = ".nfs"  # an unlinked file that a process of this host has still open
_PATIENCE_SECONDS = 5.0  # for what is only for a moment in the way


@dataclass(frozen=True)
class Owner:
    """The process that owns a lock."""

    host: str
    """The name of its host; empty where the lock's file cannot be understood."""
    pid: int
    since: float
    """When it took the lock, in seconds since 1970 by its own clock."""
    started: str = ""
    """When the process began, as its machine counts it, which tells apart processes of one
    number."""
    machine: str = ""
    """Where ``pid`` has a meaning: the boot of the kernel, its space of process numbers, and the
    user, who may not see the processes of others."""

    def __str__(self) -> str:
        if not self.host:
            return "an owner whose file cannot be read"
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.pid} on {self.host} since {since}"


UNREADABLE = Owner("", 0, 0.0)


class FolderInUse(RuntimeError):
    """Another process, ``owner``, has the lock."""

    def __init__(self, path: Path, owner: Owner) -> None:
        super().__init__(f"{path}: taken by {owner}")
        self.owner = owner


@cache
def _machine() -> str:
    parts = [socket.gethostname(), str(os.getuid())]
    with suppress(OSError):  # no Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str:
    """When the process of that number began; empty where there is none, or where it has ended and
    waits to be reaped."""
    try:
        # Ticks since boot: unlike a time of day, a clock that is set does not move them.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if os.path.exists("/proc/self/stat"):
        return ""
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return ""


def _this_process() -> Owner:
    pid = os.getpid()
    return Owner(socket.gethostname(), pid, time.time(), _started(pid), _machine())


def _runs(owner: Owner) -> bool | None:
    """Whether an owner on this machine still runs; None for an owner on another machine."""
    if owner.machine != _machine() or not owner.started:
        return None
    return _started(owner.pid) == owner.started


def _read(file: Path) -> tuple[Owner, float] | None:
    """Who wrote the file and when it was last renewed; None where it is gone."""
    try:
        with open(file, "rb") as opened:  # opening makes NFS ask for the present time
            text, renewed = opened.read(), os.fstat(opened.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except OSError:
        try:
            return UNREADABLE, file.stat().st_mtime
        except OSError:
            return None
    try:
        return Owner(**json.loads(text)), renewed
    except (ValueError, TypeError):  # empty or cut by a file system that went down
        return UNREADABLE, renewed


def _files(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        return [path]


def owner_of(path: Path) -> Owner | None:
    """The owner of the lock at ``path``; None where the lock is free or its owner is dead.

    This only reads: it keeps nobody from taking the lock, and needs no right to write. It has no
    file to compare with, so it goes by this host's clock where the owner is on another machine.
    """
    for file in _files(path):
        found = _read(file)
        if found is None or file.name.startswith(_LEFTOVER):
            continue
        owner, renewed = found
        runs = _runs(owner)
        if runs or (runs is None and time.time() - renewed <= STALE_SECONDS):
            return owner
    return None


class FolderLock:
    """A lock that one process at a time has. It ends with :meth:`release`, or with the process,
    however that ends; a forked child does not have it."""

    def __init__(self, path: Path) -> None:
        """Name the lock, without taking it. ``path`` is that of the lock itself, as ``RUN/.lock``;
        the folder in which it lies is created when the lock is taken."""
        self.path = path
        self._token = ""
        self._pid = 0
        self._lent: list[Path] = []
        self._over = threading.Event()

    @property
    def held(self) -> bool:
        """Whether this process has the lock, as far as it knows."""
        return bool(self._token) and self._pid == os.getpid()

    def lend(self, pid: int) -> None:
        """Let the lock last as long as the process ``pid`` of this machine, too, in case this one
        is killed and a child goes on alone. :meth:`release` ends both.

        Raises:
            OSError: the folder cannot be written.
        """
        lent = self.path / f"{self._token}.{pid}"
        values = {**asdict(_this_process()), "pid": pid, "started": _started(pid)}
        lent.write_text(json.dumps(values))
        self._lent.append(lent)

    def still_there(self) -> bool:
        """Whether this process has the lock and, as a look at the disk shows, nobody has broken it.
        Somebody may have: the folder was removed, or this process stood still for longer than
        others wait."""
        return self.held and (self.path / self._token).exists()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            FolderInUse: another process has the lock; nothing was changed.
            OSError: the folder cannot be written.
        """
        if self.held:
            raise FolderInUse(self.path, _this_process())
        for file in _files(self.path):
            found = _read(file)
            if found is not None and _runs(found[0]):  # known without writing anything
                raise FolderInUse(self.path, found[0])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        token = uuid.uuid4().hex
        prepared = self.path.with_name(f"{self.path.name}.{token}")
        prepared.mkdir()
        try:
            own = prepared / token
            own.write_text(json.dumps(asdict(_this_process())))
            self._take(prepared, token)
        finally:
            shutil.rmtree(prepared, ignore_errors=True)
        self._token, self._pid = token, os.getpid()
        self._over = threading.Event()
        threading.Thread(
            target=_renew, args=(self.path / token, self._over), name="lock", daemon=True
        ).start()
        self._clean_up()

    def _take(self, prepared: Path, token: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                os.rename(prepared, self.path)
                return
            except OSError:
                if (self.path / token).exists():  # done, and the server's answer was lost
                    return
                if not prepared.exists():
                    raise
            in_the_way = self._break_dead(prepared / token)
            if in_the_way is None:
                try:  # where renaming to an empty folder does not replace it
                    os.rmdir(self.path)
                except OSError:
                    in_the_way = UNREADABLE
            if in_the_way is not None and time.monotonic() > deadline:
                raise FolderInUse(self.path, in_the_way)
            if in_the_way is not None:
                time.sleep(0.01)

    def _break_dead(self, own: Path) -> Owner | None:
        """Remove the files of dead owners; returns what is left and not removed yet, if anything.

        Raises:
            FolderInUse: an owner is alive.
        """
        left = None
        for file in _files(self.path):
            found = _read(file)
            if found is None:
                continue
            if file.name.startswith(_LEFTOVER):
                left = found[0]
                continue
            if _is_alive(file, own):
                raise FolderInUse(self.path, found[0])
            file.unlink(missing_ok=True)
        return left

    def _clean_up(self) -> None:
        """Remove what takers of the lock that were killed have prepared."""
        own = self.path / self._token
        for prepared in self.path.parent.glob(f"{self.path.name}.*"):
            files = _files(prepared)
            found = _read(files[0]) if files else None
            if found is not None and _runs(found[0]) is False:
                shutil.rmtree(prepared, ignore_errors=True)
            elif found is None or _runs(found[0]) is None:
                try:
                    if own.stat().st_mtime - prepared.stat().st_mtime > STALE_SECONDS:
                        shutil.rmtree(prepared, ignore_errors=True)
                except OSError:
                    continue

    def release(self) -> None:
        """Give the lock back; this does nothing where this process does not have it."""
        if not self.held:
            return
        self._over.set()
        for file in (*self._lent, self.path / self._token):
            file.unlink(missing_ok=True)
        self._token, self._lent = "", []
        with suppress(OSError):  # somebody else has taken it already
            os.rmdir(self.path)

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def _is_alive(file: Path, own: Path) -> bool:
    """Whether the owner of a lock's file gives signs of life. ``own`` is a file of this process on
    the same file system, whose clock tells how long ago the last sign was."""
    found = _read(file)
    if found is None:
        return False
    runs = _runs(found[0])
    if runs is not None:
        return runs
    if _silence(found[1], own) <= STALE_SECONDS:
        return True
    # The file system itself may have stood still: an owner that waited for it is back by now.
    time.sleep(1.5 * HEARTBEAT_SECONDS)
    again = _read(file)
    return again is not None and _silence(again[1], own) <= STALE_SECONDS


def _silence(renewed: float, own: Path) -> float:
    os.utime(own)
    return own.stat().st_mtime - renewed


def _renew(file: Path, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT_SECONDS):
        try:
            os.utime(file)
        except FileNotFoundError:
            return  # broken: still_there tells
        except OSError:
            continue  # the file system may come back
