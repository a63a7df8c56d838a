"""What reading a corpus found: files that were read, files that were left out and why, and
documents that were mended."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Reasons to leave a file out, as they follow its number ("2 binary")
ARCHIVE = "archived or packed"
BINARY = "binary"
EMPTY = "empty"
HIDDEN = "hidden"
LINK_ABOVE = "linked to a folder that holds the corpus"
LINKED_AGAIN = "linked to a folder that is read anyway"
LINK_TO_NOTHING = "linked to nothing"
NO_COLUMN = "without the column data.text_field"
NO_RECORDS = "JSON without data.text_field"
NO_REGULAR_FILE = "not regular"
NOT_UTF8 = "not UTF-8"
OFFICE = "in an office or PDF format"
WITHOUT_TEXT = "without text"

HINTS: Mapping[str, str] = {
    ARCHIVE: "unpack it",
    NO_RECORDS: "JSON lines or an array of objects are read",
    NOT_UTF8: "convert it with iconv",
    OFFICE: "convert it to plain text",
}
"""What the user can do about files that were left out, by reason."""


@dataclass
class LeftOut:
    """The files, links and hidden folders that were left out for one reason."""

    files: int
    bytes: int
    """Their size in bytes as they lie on disk."""
    example: str
    """The first one of them, as a path in the corpus."""


@dataclass
class Tally:
    """The counts of one reading, which fills them as it goes; they are part of the manifest."""

    files_read: dict[str, int] = field(default_factory=dict)
    """The number of files with text, by format."""
    files_not_reached: int = 0
    """The number of files for which ``data.max_bytes`` left no room."""
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    """What was left out, by reason."""
    replaced_documents: int = 0
    """The number of documents in which bytes that are not UTF-8 became U+FFFD."""
    replaced_example: str | None = None
    """The file of the first of these documents; None in a corpus that does not consist of files."""

    def read(self, kind: str) -> None:
        """Count a file with text."""
        self.files_read[kind] = self.files_read.get(kind, 0) + 1

    def leave_out(self, reason: str, path: Path, root: Path) -> None:
        """Count ``path`` of the corpus ``root`` as left out."""
        try:
            size = os.lstat(path).st_size if not path.is_dir() else 0
        except OSError:  # it has gone, or may not be looked at
            size = 0
        entry = self.left_out.setdefault(reason, LeftOut(0, 0, _inside(path, root)))
        entry.files += 1
        entry.bytes += size

    def replace(self, path: Path | None, root: Path | None) -> None:
        """Count a document with bytes that are not UTF-8, in ``path`` of the corpus ``root``."""
        self.replaced_documents += 1
        if self.replaced_example is None and path and root:
            self.replaced_example = _inside(path, root)

    def add(self, other: Tally) -> None:
        """Add the counts of the reading of what follows."""
        for kind, number in other.files_read.items():
            self.files_read[kind] = self.files_read.get(kind, 0) + number
        self.files_not_reached += other.files_not_reached
        for reason, entry in other.left_out.items():
            mine = self.left_out.setdefault(reason, LeftOut(0, 0, entry.example))
            mine.files += entry.files
            mine.bytes += entry.bytes
        self.replaced_documents += other.replaced_documents
        self.replaced_example = self.replaced_example or other.replaced_example

    def left_out_line(self) -> str:
        """One line on everything that was left out; empty where nothing was."""
        if not self.left_out:
            return ""
        entries = sorted(self.left_out.items(), key=lambda item: (-item[1].files, item[0]))
        files = sum(entry.files for _, entry in entries)
        parts = []
        for reason, entry in entries:
            hint = f"; {HINTS[reason]}" if reason in HINTS else ""
            parts.append(f"{entry.files} {reason} ({entry.example}{hint})")
        size = readable_bytes(sum(entry.bytes for _, entry in entries))
        whole = files + sum(self.files_read.values()) + self.files_not_reached
        return f"left out {files} of {counted(whole, 'file')} ({size}): {', '.join(parts)}"

    def lines(self) -> list[str]:
        """The lines for the user: the files that were read or left out, and the documents that were
        mended."""
        lines = []
        if self.files_read:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(self.files_read.items()))
            beyond = (
                f", {self.files_not_reached:,} after data.max_bytes were not"
                if self.files_not_reached
                else ""
            )
            lines.append(f"read {counted(sum(self.files_read.values()), 'file')} ({kinds}){beyond}")
        if left_out := self.left_out_line():
            lines.append(left_out)
        if self.replaced_documents:
            example = f" ({self.replaced_example})" if self.replaced_example else ""
            number = counted(self.replaced_documents, "document")
            lines.append(f"replaced what is not UTF-8 by U+FFFD in {number}{example}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The tally as ``manifest.json`` holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tally:
        """The tally that :meth:`to_json` gave these values of.

        Raises:
            TypeError: :meth:`to_json` did not make these values.
        """
        left_out = {why: LeftOut(**entry) for why, entry in values["left_out"].items()}
        return cls(**{**values, "left_out": left_out})


def counted(number: int, noun: str) -> str:
    """A number and its noun, which is in the plural unless the number is one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def readable_bytes(size: int) -> str:
    """A size in bytes, kB, MB or GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return counted(size, "byte")


def _inside(path: Path, root: Path) -> str:
    return path.name if path == root else path.relative_to(root).as_posix()
