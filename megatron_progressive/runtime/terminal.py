"""Output on terminals that do not have every sign."""

from __future__ import annotations

import codecs
import sys

_PLAIN = {"τ": "tau", "→": "->", "×": "x", "…": "...", "≥": ">=", "≤": "<=", "²": "^2", "–": "-"}
_HANDLER = "megatron_progressive.plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(_PLAIN.get(sign, "?") for sign in signs), error.end


def write_plainly() -> None:
    """Let standard output and standard error write signs that their encoding lacks in ASCII from
    now on (τ as tau) instead of failing."""
    codecs.register_error(_HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test's or an embedder's need not have it
            stream.reconfigure(errors=_HANDLER)
