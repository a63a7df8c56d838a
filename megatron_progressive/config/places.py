"""Where things lie: names of folders, paths with ``~`` and variables, and what can be read or
written there, asked before anything is made."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from megatron_progressive.config.accepted import PATHS
from megatron_progressive.config.errors import ConfigError
from megatron_progressive.config.schema import RunConfig
from megatron_progressive.config.values import shown

NAME_BYTES = 200
"""Longest name of a study or a size, to which names of runs add: file systems have 255 bytes."""
FILE_NAME_BYTES = 255
_ADDED = len("..yaml.tmp")
"""Most that is put around the name of a run for a file of it."""

PLACE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
                errno.ENAMETOOLONG, errno.ELOOP)  # fmt: skip
"""Of a path that no second try makes better."""

_VARIABLE = re.compile(r"\$(?:\{(?P<braced>[^}]*)(?P<end>\}?)|(?P<bare>[A-Za-z_][A-Za-z0-9_]*))")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_name(field: str, name: str, most: int = NAME_BYTES) -> None:
    """Whether a text can be the name of a folder, on every file system and in a shell.

    Raises:
        ConfigError: it is not.
    """
    if (
        not name.strip()
        or name != name.strip()
        or name in (".", "..")
        or name[0] == "-"
        or not name.isprintable()
        or any(sign in name for sign in "/$")
        or len(name.encode(errors="surrogateescape")) > most
    ):
        raise ConfigError(
            f"{field}: got {shown(name)}; accepted: a folder's name of up to {most} bytes, without "
            "/, $, control characters, spaces at its ends or - at its start"
        )


def check_run_name(field: str, name: str) -> None:
    """Whether a run can have a name: one of a folder with room for the endings of files beside it.

    Raises:
        ConfigError: it does not.
    """
    check_name(field, name, FILE_NAME_BYTES - _ADDED)


def expanded(field: str, path: str) -> str:
    """A path with ``$NAME``, ``${NAME}`` and ``~`` replaced by what they stand for.

    Raises:
        ConfigError: empty, a variable that is not set, or no such user's home.
    """

    def value(match: re.Match[str]) -> str:
        name = match["bare"] or match["braced"]
        if not match["bare"] and not (match["end"] and _IDENTIFIER.fullmatch(name)):
            raise ConfigError(
                f"{field}: got {shown(path)}; accepted: a path with variables as $NAME or ${{NAME}}"
            )
        if not os.environ.get(name):
            raise ConfigError(
                f"{field}: got {shown(path)}, whose variable {name} is "
                f"{'empty' if name in os.environ else 'not set'}; accepted: a path whose variables "
                "have values"
            )
        return os.environ[name]

    found = os.path.expanduser(_VARIABLE.sub(value, path))
    if not found or any(ord(sign) < 32 or ord(sign) == 127 for sign in found):
        accepted = "a path without control characters" if found else "a path"
        raise ConfigError(f"{field}: got {shown(path)}; accepted: {accepted}")
    if found.startswith("~"):
        raise ConfigError(
            f"{field}: got {shown(path)}; accepted: ~ or ~USER of a user who has a home (./~ for "
            "a name that begins so)"
        )
    return found


def place(option: str, path: str) -> Path:
    """The path that a word of the command line means.

    Raises:
        ConfigError: see :func:`expanded`; or it cannot be reached.
    """
    found = Path(expanded(option, path))
    check_reachable(option, found)
    return found


def check_reachable(field: str, path: Path) -> None:
    """Whether one can know if something is at ``path``.

    Raises:
        ConfigError: a folder on the way may not be entered, links run in circles, or a name is too
            long.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        _check_lengths(field, path)
    except OSError as error:
        raise _error(field, path, path, str(error.strerror), "a path that can be read") from None


def check_readable(field: str, path: Path) -> None:
    """Whether what is at ``path`` can be read, where anything is.

    Raises:
        ConfigError: it cannot.
    """
    check_reachable(field, path)
    if path.exists() and not _may(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        accepted = "what can be read"
        raise _error(field, path, path, "Permission denied", accepted)


def check_paths(config: RunConfig) -> None:
    """Whether the folders and files that a run is to read can be read, where they are there.

    Raises:
        ConfigError: one cannot, by its field.
    """
    check_readable("run.dir", config.folder)
    for field in PATHS:
        section, key = field.split(".")
        value = getattr(getattr(config, section), key)
        if value is not None:
            check_readable(field, Path(value.removeprefix("hf:")))


def check_writable(field: str, folder: Path, added: int = 0) -> None:
    """Whether ``folder`` can be made, or is there, and can be written to. Makes nothing.

    Args:
        field: that names it.
        folder: the path.
        added: bytes that the name of a half-written one has more.

    Raises:
        ConfigError: it cannot.
    """
    accepted = "a folder that can be made and written to"
    for at in (folder, *folder.parents):
        try:
            os.stat(at)
        except FileNotFoundError:
            if at.is_symlink():
                raise _error(field, folder, at, "a link to nothing", accepted) from None
            continue
        except OSError as error:
            raise _error(field, folder, at, str(error.strerror), accepted) from None
        if not at.is_dir():
            raise _error(field, folder, at, "a file", accepted)
        if not _may(at, os.W_OK | os.X_OK):
            why = "Permission denied"
            if hasattr(os, "statvfs") and os.statvfs(at).f_flag & os.ST_RDONLY:
                why = "Read-only file system"
            raise _error(field, folder, at, why, accepted)
        break
    _check_lengths(field, folder, added)


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _check_lengths(field: str, path: Path, added: int = 0) -> None:
    """The kernel looks at no name in a folder that is not there yet."""
    for part in path.parts:
        size = len(part.encode(errors="surrogateescape"))
        if size + (added if part == path.name else 0) > FILE_NAME_BYTES:
            raise _error(field, path, Path(part), "File name too long", "shorter names")


def _error(field: str, path: Path, at: Path, why: str, accepted: str) -> ConfigError:
    where = "" if at == path else f"{shown(str(at))}: "
    got = shown(str(path))
    return ConfigError(f"{field}: got {got} ({where}{why}); accepted: {accepted}")
