"""The documents of one file, in the format that its name and its content tell."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator

from megatron_progressive.data.decoding import NotText, Stream, decoded
from megatron_progressive.data.records import JSON_LINES, is_json, json_documents
from megatron_progressive.data.tables import arrow_documents, csv_documents, parquet_documents
from megatron_progressive.data.tally import EMPTY

PIECE_BYTES = 16 * 1024
"""The fewest bytes of a piece of a plain-text file that is cut into documents; the most are twice
as many."""

LARGE_FILE_BYTES = 4 * 1024 * 1024
"""Plain-text files above so many bytes are cut even in a folder: they are collections, not
documents."""

_TABLES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_PARQUET = (".parquet", ".pq")
_ARROW = (".arrow", ".feather")
_PARAGRAPH_END = re.compile(rb"\n\r?\n")
_LINE_END = re.compile(rb"\n")


def open_documents(stream: Stream, field: str, cut: bool) -> tuple[str, Iterator[str]]:
    """The format of an open file and its documents, which are read as they are asked for.

    Documents may be blank, and hold halves of surrogate pairs (see :func:`.decoded`).

    Args:
        stream: the open file.
        field: ``data.text_field``, for files with records.
        cut: whether plain text is cut into pieces even where it is short.

    Raises:
        NotText: the file cannot be read as text; the iterator may raise this before its first
            document.
        ConfigError: the file is damaged, or a record lacks ``field``; the iterator may raise this
            at any time.
    """
    head, suffix = stream.head, stream.suffix
    if stream.begin:  # the file's first bytes have told that it has a record on each line
        return "JSON", json_documents(stream, field)
    if not head:
        raise NotText(EMPTY)
    if suffix in _PARQUET or head.startswith(b"PAR1"):
        return "Parquet", parquet_documents(stream, field)
    if suffix in _ARROW or head.startswith(b"ARROW1"):
        return "Arrow", arrow_documents(stream, field)
    stream.check_text()
    if suffix in _TABLES:
        return suffix[1:].upper(), csv_documents(stream, field, _TABLES[suffix])
    if suffix in JSON_LINES or suffix == ".json":
        return "JSON", json_documents(stream, field)
    if is_json(stream, field):
        return "JSON", json_documents(stream, field)
    return "plain text", _plain(stream, cut)


def _plain(stream: Stream, cut: bool) -> Iterator[str]:
    """One document, or pieces of it where ``cut`` is true or the file is large."""
    file = stream.file
    # most files are all head: reading them again would double what they cost
    start = stream.head if stream.is_whole and not cut else file.read(LARGE_FILE_BYTES + 1)
    if not cut and len(start) <= LARGE_FILE_BYTES:
        yield decoded(start)
        return
    # a small file in smaller pieces, so that it still has some to hold out
    target = max(1024, min(PIECE_BYTES, len(start) // 48))
    blocks = itertools.chain((start,), iter(lambda: file.read(1 << 20), b""))
    for piece in _pieces(blocks, target):
        yield decoded(piece)


def _pieces(blocks: Iterator[bytes], target: int) -> Iterator[bytes]:
    """Consecutive pieces of ``target`` bytes to twice as many, cut between paragraphs.

    Where no paragraph ends in that range, the cut is between lines, or else between characters. Of
    several possible ends the one is taken whose preceding text has the lowest hash: then the pieces
    of two copies that differ by a header or by line ends soon begin and end alike.
    """
    limit = 2 * target
    rest = bytearray()
    ended = False
    while rest or not ended:
        while len(rest) <= limit and not ended:
            block = next(blocks, b"")
            rest += block
            ended = not block
        end = len(rest)
        if end > limit:
            ends = [found.end() for found in _PARAGRAPH_END.finditer(rest, target, limit)]
            if not ends:
                ends = [found.end() for found in _LINE_END.finditer(rest, target, limit)]
            if ends:
                end = min(ends, key=lambda at: _hash_before(rest, at))
            else:
                end = limit
                while end > target and rest[end] & 0xC0 == 0x80:  # inside a character
                    end -= 1
        if end:
            yield bytes(rest[:end])
        del rest[:end]


def _hash_before(text: bytearray, at: int) -> int:
    return zlib.crc32(text[max(0, at - 96) : at].translate(None, b" \t\r\n")[-32:])
