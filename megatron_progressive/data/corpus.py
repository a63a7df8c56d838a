"""A corpus as a stream of documents.

``data.corpus`` is ``stdlib`` (the Python sources of the running interpreter: always there, no
network), ``packages`` (those of the installed packages that this one needs), a file or folder, or
``hf:NAME`` (``hf:NAME:CONFIG``), which the ``datasets`` library streams.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import stat
import sysconfig
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError, DataSection
from megatron_progressive.data.decoding import NotText, not_allowed, one_line, open_stream
from megatron_progressive.data.listing import Listing, list_files
from megatron_progressive.data.packages import package_sources, packages_root
from megatron_progressive.data.reading import open_documents
from megatron_progressive.data.records import text_of
from megatron_progressive.data.tally import EMPTY, HINTS, WITHOUT_TEXT, Tally

ACCEPTED = "stdlib, packages, a file or folder with text, or hf:NAME"
READ = (
    "plain text, JSON lines, a JSON array of objects, CSV or TSV with a header, Parquet or Arrow, "
    "in UTF-8 or with a byte order mark, also as .gz, .xz, .bz2 or .zst"
)

_STDLIB_SKIPPED = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
_SOURCES = ("stdlib", "packages")
"""Corpora that are there after installing; each environment has a copy of its own."""
_HALVES = re.compile("[\ud800-\udfff]+")


@dataclass(frozen=True)
class Corpus:
    """The place that documents come from. :func:`open_corpus` makes one; nothing is read before it
    is used."""

    data: DataSection
    root: Path | None
    """The file or folder; None for a data set of the Hugging Face hub."""
    revision: str | None = None
    """The commit of a Hugging Face data set that is read (default: the newest one at each
    reading)."""

    @property
    def is_hub(self) -> bool:
        """Whether the ``datasets`` library reads the corpus; behind such a name a folder may stand,
        too."""
        return self.data.corpus.startswith("hf:")

    @property
    def is_sources(self) -> bool:
        """Whether it is the Python sources of the interpreter or of packages."""
        return self.data.corpus in _SOURCES

    @property
    def name(self) -> str:
        """A short name of the corpus that can be part of a file name."""
        spec = self.data.corpus
        if not self.is_sources and self.root is not None:
            spec = self.root.resolve().name.split(".")[0]
        spec = re.sub(r"[^A-Za-z0-9._-]+", "-", spec.removeprefix("hf:")).strip(".-")
        return spec[:60] or "corpus"

    def files(self) -> list[Path]:
        """The files of a local corpus, sorted by their path; hidden files are left out.

        Raises:
            ConfigError: a file or folder may not be read.
        """
        return self.listing().files

    def listing(self) -> Listing:
        """The files of a local corpus, and what is left out of its folders.

        Raises:
            ConfigError: a file or folder may not be read.
        """
        if self.root is None:
            return Listing([], [], [])
        if not self.is_sources:
            return list_files(self.root)
        if self.data.corpus == "packages":
            return Listing(_package_sources(self.root), [], [])
        listing = list_files(self.root, _STDLIB_SKIPPED)
        sources = [path for path in listing.files if path.suffix == ".py"]
        return Listing(sources, [], listing.folders)

    def identity(self) -> list[Any]:
        """What decides the documents, as JSON can hold it: the names, sizes and times of files, or,
        for Python sources, of which each environment has a copy, their names and content."""
        if self.is_sources and self.root is not None:
            return [self.data.corpus, _content(self.root, tuple(self.files()))]
        listing: list[Any] = ["hf", self.data.corpus] if self.is_hub else []
        for path in self.files():
            stat = path.stat()
            name = path.name if path == self.root else str(path.relative_to(self.root or path))
            listing.append([name, stat.st_size, stat.st_mtime_ns])
        return listing

    def pinned(self) -> Corpus:
        """The same corpus, each reading of which is of the commit that a Hugging Face data set has
        now. A local corpus, and one whose commit cannot be found out, stays as it is."""
        if not self.is_hub or self.root is not None:
            return self
        import huggingface_hub

        try:
            found = huggingface_hub.HfApi().dataset_info(_hub_name(self.data.corpus)[0])
        except Exception:  # whether the data set can be read is told by reading it
            return self
        return replace(self, revision=found.sha)

    def size(self) -> int | None:
        """The number of bytes to read, as they lie on disk (fewer than those of the text where
        files are compressed); None where it is not known."""
        if self.is_hub:
            return self.data.max_bytes or None
        total = sum(path.stat().st_size for path in self.files())
        return min(total, self.data.max_bytes or total)

    def documents(self, tally: Tally | None = None) -> Iterator[str]:
        """The documents that are not blank, up to ``data.max_bytes`` of UTF-8; the last one is
        shortened to that length. Files of a folder that cannot be read as text are left out.

        Args:
            tally: gets the counts of what was read and left out.

        Raises:
            ConfigError: there is no text at all, the only file cannot be read as text, a file is
                damaged or may not be read, or there is no field ``data.text_field``.
        """
        tally = Tally() if tally is None else tally
        read, limit = 0, self.data.max_bytes
        source = _from_hub(self.data, self.revision) if self.is_hub else self._from_files(tally)
        with contextlib.closing(source):
            for path, text in source:
                text = text.removeprefix("\ufeff")
                try:
                    encoded = text.encode()
                except UnicodeEncodeError:  # of a bad byte, or JSON's half of a surrogate pair
                    text = _HALVES.sub("\ufffd", text)
                    encoded = text.encode()
                    tally.replace(path, self.root)
                if limit and read + len(encoded) > limit:
                    encoded = encoded[: limit - read]
                    text = encoded.decode(errors="ignore")
                if text and not text.isspace():
                    read += len(encoded)
                    yield text
                if limit and read >= limit:
                    break
        if not read:
            found = f" ({line})" if (line := tally.left_out_line()) else ""
            raise ConfigError(
                f"data.corpus: got {self.data.corpus!r}, which holds no text{found}; accepted: "
                f"{ACCEPTED}"
            )

    def _from_files(self, tally: Tally) -> Generator[tuple[Path | None, str]]:
        """The file and the text of each document of a local corpus."""
        listing, field = self.listing(), self.data.text_field
        root = self.root
        assert root is not None
        for reason, path in listing.left_out:
            tally.leave_out(reason, path, root)
        tally.files_not_reached = len(listing.files)
        refused: list[NotText] = []
        for path in listing.files:
            tally.files_not_reached -= 1
            try:
                with open_stream(path) as stream:
                    kind, texts = open_documents(stream, field, cut=len(listing.files) == 1)
                    has_text = False
                    for text in texts:
                        if not has_text and text and not text.isspace():
                            has_text = True
                            tally.read(kind)
                        yield path, text
                if not has_text:
                    raise NotText(WITHOUT_TEXT)
            except NotText as why:
                refused.append(why)
                # of Python sources, an empty __init__.py is nothing to report
                if not self.is_sources:
                    tally.leave_out(why.reason, path, root)
        if refused and not tally.files_read:
            self._refuse(refused)

    def _refuse(self, refused: list[NotText]) -> None:
        """Raise the error of a corpus none of whose files can be read as text."""
        errors = [why.error for why in refused if why.error]
        if len(errors) == len(refused):
            raise errors[0]
        reason = refused[0].reason
        if self.root is not None and self.root.is_file() and reason not in (EMPTY, WITHOUT_TEXT):
            hint = f" ({HINTS[reason]})" if reason in HINTS else ""
            raise ConfigError(
                f"data.corpus: got {self.data.corpus!r}, which holds no text that can be read: "
                f"{reason}{hint}; accepted: {READ}"
            )


def open_corpus(data: DataSection) -> Corpus:
    """The corpus that ``data.corpus`` names.

    Raises:
        ConfigError: there is no such file or folder, or it may not be read.
    """
    spec = data.corpus
    if spec == "stdlib":
        return Corpus(data, Path(sysconfig.get_paths()["stdlib"]))
    if spec == "packages":
        return Corpus(data, packages_root())
    if spec.startswith("hf:"):
        if not spec[3:]:
            raise ConfigError(f"data.corpus: got {spec!r}; accepted: {ACCEPTED}")
        local = Path(_hub_name(spec)[0])
        return Corpus(data, local if local.is_dir() else None)
    root = Path(spec)
    try:
        mode = root.stat().st_mode if spec else 0
    except PermissionError:
        raise not_allowed(root) from None
    except OSError:  # also of a name that no file can have
        mode = 0
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        why = "is no file or folder" if mode else "does not exist"
        raise ConfigError(f"data.corpus: got {spec!r}, which {why}; accepted: {ACCEPTED}")
    return Corpus(data, root)


@functools.cache
def _package_sources(root: Path) -> list[Path]:
    return package_sources(root)


@functools.cache
def _content(root: Path, files: tuple[Path, ...]) -> str:
    """A hash of the names and the content of files that do not change while a process runs."""
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _hub_name(spec: str) -> tuple[str, str | None]:
    """The name and the configuration in ``hf:NAME`` or ``hf:NAME:CONFIG``."""
    name, _, configuration = spec.removeprefix("hf:").partition(":")
    return name, configuration or None


def _from_hub(data: DataSection, revision: str | None) -> Generator[tuple[Path | None, str]]:
    import datasets

    name, configuration = _hub_name(data.corpus)
    rows: Iterator[Any]
    try:
        pinned = {} if revision is None else {"revision": revision}
        loaded = datasets.load_dataset(name, configuration, split="train", streaming=True, **pinned)
        rows = iter(loaded)
        first = next(rows, None)
    except Exception as error:  # what the library raises is as varied as its sources
        raise ConfigError(
            f"data.corpus: got {data.corpus!r}, which cannot be read ({one_line(error)}); "
            "accepted: the name of a data set with a train split, reachable from here"
        ) from None
    if first is not None:
        yield None, text_of(first, data.text_field, data.corpus)
    for row in rows:
        yield None, text_of(row, data.text_field, data.corpus)
