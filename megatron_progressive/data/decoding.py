"""A file as a stream of UTF-8 bytes: decompressed, without a byte order mark, and with UTF-16
decoded.

A file that is not text is recognised here. Nothing is decoded to ``str`` yet.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import itertools
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_progressive.config import ConfigError
from megatron_progressive.data.tally import ARCHIVE, BINARY, NOT_UTF8, OFFICE

HEAD_BYTES = 64 * 1024
"""How many bytes of a file tell its encoding and format."""

_BLOCK_BYTES = 256 * 1024
_COMPRESSED = {
    ".gz": b"\x1f\x8b",
    ".xz": b"\xfd7zXZ\0",
    ".lzma": b"\x5d\0\0",
    ".bz2": b"BZh",
    ".zst": b"\x28\xb5\x2f\xfd",
}
"""The ending of a compressed file's name, and the bytes that the file begins with."""
_OTHER_NAMES = {".gzip": ".gz", ".zstd": ".zst"}
_TAR_NAMES = {".tgz": ".gz", ".txz": ".xz", ".tbz2": ".bz2"}
_MARKS = (  # the longer ones first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ARCHIVES = (b"PK\x03\x04", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")
_ARCHIVE_SUFFIXES = (
    ".zip", ".tar", ".tgz", ".txz", ".tbz2", ".7z", ".rar", ".lz4", ".br", ".z",
)  # fmt: skip
_OFFICE_SUFFIXES = (
    ".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi", ".xls", ".xlsx", ".ods", ".ppt",
    ".pptx", ".odp",
)  # fmt: skip
_CONTROLS = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_ESCAPED = re.compile("[\udc80-\udcff]+")

DAMAGED = (EOFError, OSError, UnicodeDecodeError, lzma.LZMAError, zlib.error)
"""The exceptions that reading a stream raises where its file is damaged."""


class NotText(Exception):
    """A file cannot be read as text.

    Args:
        reason: one of the reasons in :mod:`.tally`.
        error: what to say where there is no other file (default: the reason).
    """

    def __init__(self, reason: str, error: ConfigError | None = None) -> None:
        super().__init__(reason)
        self.reason, self.error = reason, error


def one_line(error: BaseException) -> str:
    """The message of another library's exception, as it fits at the end of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def not_allowed(path: Path) -> ConfigError:
    """The error for a file or folder that this user may not read."""
    return ConfigError(
        f"data.corpus: got {path}, which this user may not read; accepted: files and folders that "
        "can be read"
    )


def decoded(content: bytes) -> str:
    """UTF-8 as text. A byte that is not UTF-8 becomes half of a surrogate pair, which
    :meth:`.Corpus.documents` replaces and counts."""
    return content.decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Stream:
    """An open file that is read as UTF-8."""

    path: Path
    suffix: str
    """The ending of its name in lower case, without that of a compression (``.jsonl``)."""
    head: bytes
    """The first bytes of its content, :data:`HEAD_BYTES` where there are so many; reading ``file``
    gives them again."""
    file: IO[bytes]
    """Its whole content as UTF-8 without a byte order mark."""
    is_whole: bool
    """Whether ``head`` is the whole content."""
    is_compressed: bool
    is_plain: bool
    """Whether its bytes are those of the file, apart from a byte order mark."""
    begin: int = 0
    """Where in the file it begins, in bytes: above 0, its head does not tell what the file is."""

    def check_text(self) -> None:
        """Raise :class:`NotText` unless ``head`` is UTF-8 text, apart from a stray byte here and
        there."""
        if self.head.startswith(b"%PDF-") or self.head.startswith(b"{\\rtf"):
            raise NotText(OFFICE)
        if self.head.startswith(_ARCHIVES) or self.head[257:262] == b"ustar":
            raise NotText(OFFICE if self.suffix in _OFFICE_SUFFIXES else ARCHIVE)
        if not (reason := _not_text(self.head, self.is_whole)):
            return
        if self.suffix in _OFFICE_SUFFIXES:
            reason = OFFICE
        elif self.suffix in _ARCHIVE_SUFFIXES:
            reason = ARCHIVE
        raise NotText(reason)


def _not_text(head: bytes, is_whole: bool) -> str | None:
    """Why ``head`` is not UTF-8 text; None where it is.

    One bad byte must not lose a file, and a file of another encoding must not be trained on as
    noise. So the bad bytes have to be few, or fewer than the good ones beyond ASCII.
    """
    if b"\0" in head and 100 * len(_CONTROLS.findall(head)) > len(head):
        return BINARY
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head, is_whole)
    if text.isascii():
        return None
    stray = [len(run) for run in _ESCAPED.findall(text)]
    bad = sum(stray)
    good = len(text) - len(text.encode("ascii", "ignore")) - bad
    if bad <= 3 or 1000 * bad <= len(head) or bad <= good:
        return None
    return NOT_UTF8


@contextmanager
def open_stream(path: Path, begin: int = 0, end: int | None = None) -> Iterator[Stream]:
    """Open a file, and decompress it by its name or by its first bytes.

    Args:
        path: the file.
        begin: the byte at or after which the first line begins that is read. The file has to be
            plain where it is not 0 or ``end`` is not None.
        end: the byte before which the last line begins that is read; None reads to the end.

    Raises:
        ConfigError: the file cannot be opened, or is not compressed as its name says.
    """
    try:
        with ExitStack() as stack:
            raw: IO[bytes] = stack.enter_context(path.open("rb"))
            if begin or end is not None:
                raw = _lines_between(raw, begin, end)
            start = raw.read(8)
            compression = _compression(path.suffix.lower(), start) if start else None
            if compression:
                raw, start = stack.enter_context(_decompressed(path, compression)), b""
            head = start + raw.read(HEAD_BYTES - len(start))
            is_whole = len(head) < HEAD_BYTES
            mark = next((name for mark, name in _MARKS if head.startswith(mark)), None)
            blocks: Iterator[bytes] = itertools.chain(
                (head,), iter(lambda: raw.read(_BLOCK_BYTES), b"")
            )
            if mark:
                blocks = _as_utf8(blocks, mark)
                head = b"".join(blocks) if is_whole else next(blocks)
                blocks = itertools.chain((head,), blocks)
            elif head.startswith(codecs.BOM_UTF8):
                next(blocks)
                head = head[len(codecs.BOM_UTF8) :]
                blocks = itertools.chain((head,), blocks)
            file = io.BufferedReader(_Blocks(blocks), HEAD_BYTES)
            is_plain = not (compression or mark)
            yield Stream(
                path, _inner_suffix(path), head, file, is_whole, bool(compression), is_plain, begin
            )
    except PermissionError:
        raise not_allowed(path) from None
    except DAMAGED as error:
        raise ConfigError(
            f"data.corpus: got {path}, damaged ({one_line(error)}); accepted: a file that can be "
            "read to its end"
        ) from None


def _lines_between(raw: IO[bytes], begin: int, end: int | None) -> IO[bytes]:
    """The lines of a file that begin at ``begin`` or later, and before ``end``."""

    def next_line(place: int) -> int:
        if place == 0:
            return 0
        raw.seek(place - 1)
        raw.readline()
        return raw.tell()

    stop = None if end is None else next_line(end)
    left = sys.maxsize if stop is None else stop - next_line(begin)
    raw.seek(next_line(begin))

    def blocks() -> Iterator[bytes]:
        nonlocal left
        while left > 0 and (block := raw.read(min(left, _BLOCK_BYTES))):
            left -= len(block)
            yield block

    return io.BufferedReader(_Blocks(blocks()), _BLOCK_BYTES)


def _compression(suffix: str, start: bytes) -> str | None:
    """How a file is compressed, as one of the endings in :data:`_COMPRESSED`."""
    suffix = (_OTHER_NAMES | _TAR_NAMES).get(suffix, suffix)
    if suffix in _COMPRESSED:
        return suffix
    for ending, magic in _COMPRESSED.items():
        if start.startswith(magic) and (ending != ".bz2" or start[4:8] == b"1AY&"):
            return ending
    return None


def _inner_suffix(path: Path) -> str:
    """The ending of a name in lower case, without that of a compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSED | _OTHER_NAMES else suffix


def _decompressed(path: Path, compression: str) -> Any:
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression in (".xz", ".lzma"):
        return lzma.open(path, "rb")
    if compression == ".bz2":
        return bz2.open(path, "rb")
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(os.fsencode(path)), "zstd")


def _as_utf8(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    # half a surrogate pair stays one, as a byte that is no UTF-8 does: :func:`decoded`
    text = codecs.iterdecode(blocks, encoding, "surrogatepass")
    return (block.encode("utf-8", "surrogatepass") for block in text)


class _Blocks(io.RawIOBase):
    """Blocks of bytes, as a file that is read from its start to its end."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
