"""A corpus as a stream of documents.

``data.corpus`` is ``stdlib`` (the Python sources of the running interpreter: always there, no
network), ``packages`` (those of the installed packages that this one needs), a file or folder, or
``hf:NAME`` (``hf:NAME:CONFIG``), which the ``datasets`` library streams.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import stat
import sysconfig
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError, DataSection
from megatron_progressive.data.decoding import NotText, not_allowed, open_stream
from megatron_progressive.data.hub import HubRows, hub_name
from megatron_progressive.data.listing import Listing, list_files
from megatron_progressive.data.packages import package_sources, packages_root
from megatron_progressive.data.reading import open_documents
from megatron_progressive.data.records import text_of
from megatron_progressive.data.tally import EMPTY, HINTS, WITHOUT_TEXT, Tally

ACCEPTED = "stdlib, packages, a file or folder with text, hf:NAME, or megatron:PREFIX"
READ = (
    "plain text, JSON lines, a JSON array of objects, CSV or TSV with a header, Parquet or Arrow, "
    "in UTF-8 or with a byte order mark, also as .gz, .xz, .bz2 or .zst"
)

_STDLIB_SKIPPED = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
_SOURCES = ("stdlib", "packages")
"""Corpora that are there after installing; each environment has a copy of its own."""
_HALVES = re.compile("[\ud800-\udfff]+")


@dataclass(frozen=True)
class Unit:
    """A part of a corpus that is read on its own (see :mod:`.units`)."""

    number: int
    """Its place in the corpus, from 0."""
    size: int | None
    """Its bytes as they lie on disk; None where that is not known."""
    files: tuple[Path, ...] = ()
    """The files of a local corpus."""
    cut: bool = False
    """Whether plain text is cut into pieces even where it is short."""
    begin: int = 0
    """Where the lines of its only file begin that belong to it, in bytes."""
    end: int | None = None
    """The byte before which these lines begin; None where the files belong to it as they are."""
    data_file: int | None = None
    """The number of the data file of a Hugging Face data set; None where all belong to it."""

    @property
    def whole_files(self) -> int:
        """The number of files that begin in it."""
        return len(self.files) if self.begin == 0 else 0


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
    def is_megatron(self) -> bool:
        """Whether it is tokens that Megatron has written; these are no documents here."""
        return self.data.corpus.startswith("megatron:")

    @property
    def is_sources(self) -> bool:
        """Whether it is the Python sources of the interpreter or of packages."""
        return self.data.corpus in _SOURCES

    @property
    def name(self) -> str:
        """A short name of the corpus that can be part of a file name."""
        spec = self.data.corpus
        if self.is_megatron:
            spec = Path(spec.removeprefix("megatron:").partition(",")[0]).name
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
        if self.is_megatron:
            names = self.data.corpus.removeprefix("megatron:").split(",")
            files = [Path(f"{name.strip()}.{kind}") for name in names for kind in ("bin", "idx")]
            return Listing([file for file in files if file.is_file()], [], [])
        if self.root is None:
            return Listing([], [], [])
        if not self.is_sources:
            return list_files(self.root)
        if self.data.corpus == "packages":
            return Listing(_package_sources(self.root), [], [])
        listing = list_files(self.root, _STDLIB_SKIPPED)
        sources = [path for path in listing.files if path.suffix == ".py"]
        return Listing(sources, [], listing.folders)

    def identity(self, known: Mapping[str, list[Any]] | None = None) -> list[Any]:
        """What decides the documents, as JSON can hold it: the names, sizes and times of files, or,
        for Python sources, of which each environment has a copy, their names and content.

        Args:
            known: identities of Python sources by :meth:`seen`, to be believed.
        """
        if self.is_sources and self.root is not None:
            if known and (identity := known.get(self.seen())):
                return identity
            return [self.data.corpus, _content(self.root, tuple(self.files()))]
        return ["hf", self.data.corpus, *self._stats()] if self.is_hub else self._stats()

    def seen(self) -> str:
        """A hash of the names, sizes and times of the files, which tells in this environment
        whether they have changed."""
        values = [str(self.root), self._stats()]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def _stats(self) -> list[Any]:
        listing: list[Any] = []
        below = f"{self.root}/"
        for path in self.files():
            stat = path.stat()
            name = path.name if path == self.root else str(path).removeprefix(below)
            name = str(path) if self.root is None else name
            listing.append([name, stat.st_size, stat.st_mtime_ns])
        return listing

    def pinned(self) -> Corpus:
        """The same corpus, each reading of which is of the commit that a Hugging Face data set has
        now. A local corpus, and one whose commit cannot be found out, stays as it is."""
        if not self.is_hub or self.root is not None:
            return self
        import huggingface_hub

        try:
            found = huggingface_hub.HfApi().dataset_info(hub_name(self.data.corpus)[0])
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

    def documents(self, tally: Tally | None = None, patient: bool = False) -> Iterator[str]:
        """The documents that are not blank, up to ``data.max_bytes`` of UTF-8; the last one is
        shortened to that length. Files of a folder that cannot be read as text are left out.

        Args:
            tally: gets the counts of what was read and left out.
            patient: whether a stream of the hub that breaks is opened again.

        Raises:
            ConfigError: there is no text at all, the only file cannot be read as text, a file is
                damaged or may not be read, or there is no field ``data.text_field``.
        """
        tally = Tally() if tally is None else tally
        limit = self.data.max_bytes or None
        reading = Reading(self, self.whole(), tally, limit, patient=patient)
        for text, _ in reading.documents():
            yield text
        if reading.refused and not tally.files_read:
            self._refuse(reading.refused)
        if not reading.bytes:
            raise self.no_text(tally)

    def no_text(self, tally: Tally) -> ConfigError:
        """The error that says that there is no text at all, and what was left out."""
        found = f" ({line})" if (line := tally.left_out_line()) else ""
        return ConfigError(
            f"data.corpus: got {self.data.corpus!r}, which holds no text{found}; accepted: "
            f"{ACCEPTED}"
        )

    def whole(self) -> Unit:
        """The corpus as a single unit."""
        files = self.files()
        return Unit(0, self.size(), tuple(files), cut=len(files) == 1)

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


class Reading:
    """One reading of a unit, from its beginning or from where an earlier reading was."""

    def __init__(
        self,
        corpus: Corpus,
        unit: Unit,
        tally: Tally,
        limit: int | None = None,
        position: dict[str, Any] | None = None,
        patient: bool = False,
    ) -> None:
        """Begin to read ``unit`` of ``corpus``.

        Args:
            tally: gets the counts of what is read and left out.
            limit: the most bytes of UTF-8 to read; the last document is shortened.
            position: the place to go on from, as :meth:`position` gave it.
            patient: whether a stream of the hub that breaks is opened again.
        """
        self._corpus, self._unit, self._tally, self._limit = corpus, unit, tally, limit
        self.bytes = 0
        """Bytes of UTF-8 of the documents so far."""
        self.refused: list[NotText] = []
        """Why files could not be read as text."""
        self._documents = 0
        self._skipped = 0
        self._rows: HubRows | None = None
        if corpus.is_hub:
            at = None if position is None else position["stream"]
            data, revision = corpus.data, corpus.revision
            self._rows = HubRows(data, revision, unit.data_file, at, patient)
            self.bytes = 0 if position is None else position["bytes"]
        elif position is not None:
            self._skipped = position["documents"]

    def position(self) -> dict[str, Any]:
        """Where the reading is, right after the last document that it gave, as JSON can hold it."""
        where: dict[str, Any] = {"documents": self._documents, "bytes": self.bytes}
        return where if self._rows is None else {**where, "stream": self._rows.position()}

    def documents(self) -> Iterator[tuple[str, int]]:
        """The documents that are not blank, with their size in bytes of UTF-8. A unit may have
        none.

        Raises:
            ConfigError: see :meth:`Corpus.documents`.
        """
        limit, root = self._limit, self._corpus.root
        source = self._from_files() if self._rows is None else self._from_hub()
        with contextlib.closing(source):
            for path, text in source:
                text = text.removeprefix("\ufeff")
                try:
                    encoded = text.encode()
                except UnicodeEncodeError:  # of a bad byte, or JSON's half of a surrogate pair
                    text = _HALVES.sub("\ufffd", text)
                    encoded = text.encode()
                    self._tally.replace(path, root)
                if limit and self.bytes + len(encoded) > limit:
                    encoded = encoded[: limit - self.bytes]
                    text = encoded.decode(errors="ignore")
                if text and not text.isspace():
                    self.bytes += len(encoded)
                    self._documents += 1
                    if self._documents > self._skipped:
                        yield text, len(encoded)
                if limit and self.bytes >= limit:
                    break

    def _from_hub(self) -> Generator[tuple[Path | None, str]]:
        assert self._rows is not None
        data = self._corpus.data
        for row in self._rows.rows():
            yield None, text_of(row, data.text_field, data.corpus)

    def _from_files(self) -> Generator[tuple[Path | None, str]]:
        """The file and the text of each document of a local corpus."""
        corpus, unit, tally = self._corpus, self._unit, self._tally
        root, field = corpus.root, corpus.data.text_field
        assert root is not None
        if unit.number == 0:
            for reason, path in corpus.listing().left_out:
                tally.leave_out(reason, path, root)
        tally.files_not_reached += unit.whole_files
        for path in unit.files:
            tally.files_not_reached -= unit.begin == 0
            try:
                with open_stream(path, unit.begin, unit.end) as stream:
                    kind, texts = open_documents(stream, field, cut=unit.cut)
                    has_text = unit.end is not None
                    if has_text and unit.begin == 0:
                        tally.read(kind)
                    for text in texts:
                        if not has_text and text and not text.isspace():
                            has_text = True
                            tally.read(kind)
                        yield path, text
                if not has_text:
                    raise NotText(WITHOUT_TEXT)
            except NotText as why:
                self.refused.append(why)
                # of Python sources, an empty __init__.py is nothing to report
                if not corpus.is_sources:
                    tally.leave_out(why.reason, path, root)


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
    if spec.startswith("megatron:"):
        return Corpus(data, None)
    if spec.startswith("hf:"):
        if not spec[3:]:
            raise ConfigError(f"data.corpus: got {spec!r}; accepted: {ACCEPTED}")
        local = Path(hub_name(spec)[0])
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
