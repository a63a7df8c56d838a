"""The preloaded library, from Python."""

from __future__ import annotations

import ctypes
import json
from typing import Any

_LIBRARY = ctypes.CDLL(None)  # preloaded: among the process's own symbols
_LIBRARY.standin_report.restype = ctypes.c_char_p
_LIBRARY.standin_freed.restype = ctypes.c_char_p
_LIBRARY.standin_freed.argtypes = [ctypes.c_void_p]
_LIBRARY.standin_access.restype = ctypes.c_char_p
_LIBRARY.standin_access.argtypes = [
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p,
]  # fmt: skip
_LIBRARY.standin_host_waits.argtypes = [ctypes.c_char_p]


def report() -> dict[str, dict[str, int]]:
    """Counts up to now: ``kernels`` and library calls by name, calls with which the ``host``
    waited, and ``numbers`` (bytes, copies, communicators)."""
    text: bytes = _LIBRARY.standin_report()
    parsed: dict[str, dict[str, int]] = json.loads(text.decode(errors="replace"))
    return parsed


def reset() -> None:
    """Kernels and waits count from zero again; the numbers stay."""
    _LIBRARY.standin_reset_counts()


def host_waits(what: str) -> None:
    """The host waits for all that was issued, to get at a value."""
    _LIBRARY.standin_host_waits(what.encode())


def freed(address: int) -> str | None:
    """The line of a refusal where memory was freed (under ``checking``)."""
    line: Any = _LIBRARY.standin_freed(address)
    return line.decode() if line else None


def access(stream: int, address: int, size: int, writes: bool, what: str) -> str | None:
    """The line of a refusal where another stream has not finished writing (under ``checking``)."""
    line: Any = _LIBRARY.standin_access(stream, address, size, int(writes), what.encode())
    return line.decode() if line else None
