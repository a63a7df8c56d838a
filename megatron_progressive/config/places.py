"""Places on disk: names of folders, paths with ``~`` and variables, and whether files there can be
read or written, which is checked before anything is made."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_progressive.config.accepted import PATHS
from megatron_progressive.config.errors import ConfigError
from megatron_progressive.config.schema import RunConfig
from megatron_progressive.config.values import shown

NAME_BYTES = 200
"""The longest name of a study or a size, in bytes. Names of runs add to it, and file systems allow
255 bytes."""
FILE_NAME_BYTES = 255
_ADDED = len("..yaml.tmp")
"""The most bytes that a file of a run puts around the run's name."""

PLACE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
                errno.ENAMETOOLONG, errno.ELOOP)  # fmt: skip
"""Errors of a path that trying again does not mend."""

_VARIABLE = re.compile(r"\$(?:\{(?P<braced>[^}]*)(?P<end>\}?)|(?P<bare>[A-Za-z_][A-Za-z0-9_]*))")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_name(field: str, name: str, most: int = NAME_BYTES) -> None:
    """Check that a text can be the name of a folder, on every file system and in a shell.

    Raises:
        ConfigError: it cannot.
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
    """Check that a run can have a name: that of a folder, with room for the endings of the files
    beside it.

    Raises:
        ConfigError: it cannot.
    """
    check_name(field, name, FILE_NAME_BYTES - _ADDED)


def expanded(field: str, path: str) -> str:
    """A path in which ``$NAME``, ``${NAME}`` and ``~`` are replaced by what they mean in a shell.

    Raises:
        ConfigError: the path is empty, a variable in it is not set, or there is no such user.
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
    """The path that a word on the command line means.

    Raises:
        ConfigError: see :func:`expanded` and :func:`check_reachable`.
    """
    found = Path(expanded(option, path))
    check_reachable(option, found)
    return found


def check_reachable(field: str, path: Path) -> None:
    """Check that it can be known whether something is at ``path``.

    Raises:
        ConfigError: a folder on the way may not be entered, links run in circles, or a name in the
            path is too long.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        _check_lengths(field, path)
    except OSError as error:
        raise _error(field, path, path, str(error.strerror), "a path that can be read") from None


def check_readable(field: str, path: Path) -> None:
    """Check that whatever is at ``path`` can be read; a path at which nothing is passes.

    Raises:
        ConfigError: it cannot be read.
    """
    check_reachable(field, path)
    if path.exists() and not _may(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        accepted = "what can be read"
        raise _error(field, path, path, "Permission denied", accepted)


def check_paths(config: RunConfig) -> None:
    """Check that the folders and files that a run is going to read can be read, as far as they
    exist.

    Raises:
        ConfigError: one of them cannot; the error names its field.
    """
    check_readable("run.dir", config.folder)
    for field, value in _paths_of(config):
        if value:
            check_readable(field, Path(value.removeprefix("hf:")))


def _paths_of(config: RunConfig) -> Iterator[tuple[str, str | None]]:
    for field in PATHS:
        section, *_, key = field.split(".")
        if field.startswith("data.mix."):
            for number, part in enumerate(config.data.mix or ()):
                yield f"data.mix[{number}].{key}", getattr(part, key)
        elif field.startswith("data.validation."):
            for name, one in (config.data.validation or {}).items():
                yield f"data.validation.{name}.{key}", getattr(one, key)
        else:
            yield field, getattr(getattr(config, section), key)


def check_writable(field: str, folder: Path, added: int = 0) -> None:
    """Check that ``folder`` can be made or is there, and that it can be written to. Nothing is
    made.

    Args:
        field: the field that names the folder.
        folder: its path.
        added: how many bytes longer its name is while it is half written.

    Raises:
        ConfigError: it cannot be made or written to.
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
    """Check the lengths of names below a folder that does not exist, which the kernel does not look
    at."""
    for part in path.parts:
        size = len(part.encode(errors="surrogateescape"))
        if size + (added if part == path.name else 0) > FILE_NAME_BYTES:
            raise _error(field, path, Path(part), "File name too long", "shorter names")


def _error(field: str, path: Path, at: Path, why: str, accepted: str) -> ConfigError:
    where = "" if at == path else f"{shown(str(at))}: "
    got = shown(str(path))
    return ConfigError(f"{field}: got {got} ({where}{why}); accepted: {accepted}")
