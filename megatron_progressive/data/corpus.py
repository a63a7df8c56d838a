"""A corpus as a stream of documents, and which of them are held out for validation.

``data.corpus`` is ``stdlib`` (the Python sources of the running interpreter: always there, no
network), a file or folder, or ``hf:NAME`` (``hf:NAME:CONFIG``), which the ``datasets`` library
streams.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import lzma
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_progressive.config import ConfigError, DataSection

logger = logging.getLogger(__name__)

ACCEPTED = "stdlib, a file or folder with text, or hf:NAME"

PIECE_BYTES = 16 * 1024
"""About how much of a plain-text file that is cut becomes one document."""

LARGE_FILE_BYTES = 4 * 1024 * 1024
"""Plain-text files above this are cut even in a folder: they are collections, not documents."""

_STDLIB_SKIPPED = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
_JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
_PARAGRAPH_END = re.compile(rb"\n\r?\n")
_DAMAGED = (UnicodeDecodeError, EOFError, OSError, lzma.LZMAError, zlib.error)


def one_line(error: BaseException) -> str:
    """The message of an exception of another library, fit for the end of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@dataclass(frozen=True)
class Corpus:
    """Where documents come from. :func:`open_corpus` makes one; nothing is read before use."""

    data: DataSection
    root: Path | None
    """File or folder; None for the Hugging Face hub."""

    @property
    def is_hub(self) -> bool:
        """Whether the ``datasets`` library reads it (a folder may be behind the name too)."""
        return self.data.corpus.startswith("hf:")

    @property
    def name(self) -> str:
        """A short name that can be part of a file name."""
        spec = self.data.corpus
        if spec != "stdlib" and self.root is not None:
            spec = self.root.resolve().name.split(".")[0]
        spec = re.sub(r"[^A-Za-z0-9._-]+", "-", spec.removeprefix("hf:")).strip(".-")
        return spec[:60] or "corpus"

    def files(self) -> list[Path]:
        """Files of a local corpus, sorted by their path; hidden ones are left out."""
        if self.root is None:
            return []
        if self.root.is_file():
            return [self.root]
        skipped = _STDLIB_SKIPPED if self.data.corpus == "stdlib" else set()
        found = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
            found += [Path(folder) / n for n in names if not n.startswith(".")]
        if self.data.corpus == "stdlib":
            found = [path for path in found if path.suffix == ".py"]
        files = [path for path in found if path.is_file()]
        return sorted(files, key=lambda path: path.relative_to(self.root or path).as_posix())

    def identity(self) -> list[Any]:
        """What decides the documents, as JSON can hold it: names, sizes and times of files."""
        if self.data.corpus == "stdlib":
            return ["stdlib", platform.python_implementation(), platform.python_version()]
        listing: list[Any] = ["hf", self.data.corpus] if self.is_hub else []
        for path in self.files():
            stat = path.stat()
            name = path.name if path == self.root else str(path.relative_to(self.root or path))
            listing.append([name, stat.st_size, stat.st_mtime_ns])
        return listing

    def size(self) -> int | None:
        """Bytes to read, as they lie on disk (less than the text's where compressed); None
        where nobody knows."""
        if self.is_hub:
            return self.data.max_bytes or None
        total = sum(path.stat().st_size for path in self.files())
        return min(total, self.data.max_bytes or total)

    def documents(self) -> Iterator[str]:
        """Every document that is not blank, up to ``data.max_bytes`` of UTF-8 (the last one
        is shortened to that). Files that are not UTF-8 text are left out.

        Raises:
            ConfigError: no text at all, a damaged file, or no field ``data.text_field``.
        """
        read, limit = 0, self.data.max_bytes
        for text in _from_hub(self.data) if self.is_hub else self._from_files():
            try:
                encoded = text.encode()
            except UnicodeEncodeError:  # JSON can spell half a surrogate pair, UTF-8 cannot
                encoded = text.encode("utf-8", "replace")
                text = encoded.decode()
            if limit and read + len(encoded) > limit:
                encoded = encoded[: limit - read]
                text = encoded.decode(errors="ignore")
            if text and not text.isspace():
                read += len(encoded)
                yield text
            if limit and read >= limit:
                break
        if not read:
            raise ConfigError(
                f"data.corpus: got {self.data.corpus!r}, which holds no text; accepted: {ACCEPTED}"
            )

    def _from_files(self) -> Iterator[str]:
        files = self.files()
        for path in files:
            if path.name.endswith(_JSON_LINES):
                yield from _json_lines(path, self.data.text_field)
            elif path.suffix == ".parquet":
                yield from _parquet(path, self.data.text_field)
            else:
                yield from _plain(path, cut=len(files) == 1)


def open_corpus(data: DataSection) -> Corpus:
    """The corpus that ``data.corpus`` names.

    Raises:
        ConfigError: there is no such file or folder.
    """
    spec = data.corpus
    if spec == "stdlib":
        return Corpus(data, Path(sysconfig.get_paths()["stdlib"]))
    if spec.startswith("hf:"):
        if not spec[3:]:
            raise ConfigError(f"data.corpus: got {spec!r}; accepted: {ACCEPTED}")
        local = Path(_hub_name(spec)[0])
        return Corpus(data, local if local.is_dir() else None)
    root = Path(spec)
    if not spec or not root.exists():
        raise ConfigError(f"data.corpus: got {spec!r}, which does not exist; accepted: {ACCEPTED}")
    return Corpus(data, root)


def content_hash(text: str) -> int:
    """64 bits of a document's content, uniform."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def split_documents(texts: Iterable[str], fraction: float) -> Iterator[tuple[str, bool]]:
    """Pairs of a document and whether it is held out for validation.

    A document is held out when its hash is in the lowest ``fraction``, so equal documents are
    on one side, wherever they stand. Where that takes none (small corpora), the document with
    the lowest hash is held out; it comes last. To know that in one pass, the lowest one so far
    waits, which is the only change of order.
    """
    threshold = int(fraction * 2**64)
    lowest: int | None = None
    waiting: list[str] = []  # the document with the lowest hash so far, and its equals
    found = False
    for text in texts:
        number = content_hash(text)
        if number < threshold:
            found = True
            yield text, True
        elif found:
            yield text, False
        elif number == lowest:
            waiting.append(text)
        elif lowest is None or number < lowest:
            yield from ((early, False) for early in waiting)
            waiting, lowest = [text], number
        else:
            yield text, False
        if found and waiting:
            yield from ((early, False) for early in waiting)
            waiting = []
    yield from ((text, not found) for text in waiting)


def _plain(path: Path, cut: bool) -> Iterator[str]:
    """The documents of a plain-text file: one, or pieces of it where ``cut`` or it is large."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8192)
        if b"\0" in head or _is_binary(head):
            logger.info("%s: not UTF-8 text, left out", path)
            return
        file.seek(0)
        if cut or size > LARGE_FILE_BYTES:
            # a small file in smaller pieces, so that it still has some to hold out
            pieces = _pieces(file, max(1024, min(PIECE_BYTES, size // 32)))
        else:
            pieces = iter((file.read(),))
        for piece in pieces:
            try:
                yield piece.decode()
            except UnicodeDecodeError:
                logger.info("%s: not UTF-8 text, left out", path)


def _is_binary(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start < len(head) - 3  # the last character may be cut
    return False


def _pieces(file: IO[bytes], target: int) -> Iterator[bytes]:
    """Consecutive pieces of ``target`` bytes or a little more, cut between paragraphs.

    Where a paragraph does not end in twice that, between lines, or else between characters.
    """
    limit = 2 * target
    rest = bytearray()
    ended = False
    while rest or not ended:
        while len(rest) <= limit and not ended:
            block = file.read(1 << 20)
            rest += block
            ended = not block
        end = len(rest)
        if end > limit:
            if paragraph := _PARAGRAPH_END.search(rest, target, limit):
                end = paragraph.end()
            elif (line := rest.rfind(b"\n", target, limit)) >= 0:
                end = line + 1
            else:
                end = limit
                while end > target and rest[end] & 0xC0 == 0x80:  # inside a character
                    end -= 1
        if end:
            yield bytes(rest[:end])
        del rest[:end]


def _field_error(data_field: str, where: object, fields: Iterable[str], why: str) -> ConfigError:
    names = ", ".join(fields) or "none"
    return ConfigError(
        f"data.text_field: got {data_field!r}, {why}; accepted: a text field of {where} ({names})"
    )


def _text_of(row: Any, field: str, where: object) -> str:
    """The text of one row; an empty one where it is null."""
    if not isinstance(row, dict):
        raise ConfigError(
            f"data.corpus: got {where}, with a line that is no JSON object; accepted: "
            "one JSON object a line"
        )
    if field not in row:
        raise _field_error(field, where, row, "which is not there")
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise _field_error(field, where, row, f"which holds {type(text).__name__}")
    return text


def _json_lines(path: Path, field: str) -> Iterator[str]:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    number = 0
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            for line in file:
                number += 1
                if not line.isspace():
                    yield _text_of(json.loads(line), field, path)
    except json.JSONDecodeError:
        raise ConfigError(
            f"data.corpus: got {path}, whose line {number} is not JSON; accepted: one JSON "
            "object a line"
        ) from None
    except _DAMAGED as error:
        raise ConfigError(
            f"data.corpus: got {path}, damaged after line {number} ({one_line(error)}); "
            "accepted: a file that can be read to its end"
        ) from None


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise _field_error(field, path, columns, "which is not there")
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for row in batch.to_pylist():
                    yield _text_of(row, field, path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f"data.corpus: got {path} ({one_line(error)}); accepted: a Parquet file"
        ) from None


def _hub_name(spec: str) -> tuple[str, str | None]:
    """Name and configuration of ``hf:NAME`` or ``hf:NAME:CONFIG``."""
    name, _, configuration = spec.removeprefix("hf:").partition(":")
    return name, configuration or None


def _from_hub(data: DataSection) -> Iterator[str]:
    import datasets

    name, configuration = _hub_name(data.corpus)
    rows: Iterator[Any]
    try:
        rows = iter(datasets.load_dataset(name, configuration, split="train", streaming=True))
        first = next(rows, None)
    except Exception as error:  # what the library raises is as varied as its sources
        raise ConfigError(
            f"data.corpus: got {data.corpus!r}, which cannot be read ({one_line(error)}); "
            "accepted: the name of a data set with a train split, reachable from here"
        ) from None
    if first is not None:
        yield _text_of(first, data.text_field, data.corpus)
    for row in rows:
        yield _text_of(row, data.text_field, data.corpus)
