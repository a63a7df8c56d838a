"""The commands that a page shows: its ``sh`` blocks, and what a test adds to make them short.

A comment before a block, ``<!-- run with: train.steps=8 -->``, gives words that are put behind each
``mprog`` command of the block that takes a configuration or a grid. Blocks of other kinds are forms
(``mprog train CONFIG``) and output; they show nothing that could be run as it stands. Output behind
a comment ``<!-- what it prints -->`` is compared with what the block before it prints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

_BLOCK = re.compile(
    r"(?:^<!-- run with: (?P<words>[^\n]*?) -->\n+)?(?P<prints>^<!-- what it prints -->\n+)?"
    r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_COMMAND = re.compile(r"^(mprog|sbatch|make|python3?|launch/\S+)\s")
_FORM = re.compile(r"[A-Z]{3,}|…|\|")
"""What makes a line a form: a word in capitals that stands for something, an ellipsis, a choice."""


@dataclass(frozen=True)
class Block:
    """One block of a page."""

    line: int
    """Where it stands, from 1."""
    kind: str
    """``sh``, ``yaml``, ``text``, …"""
    text: str
    words: str
    """What is added to its commands."""
    prints: str | None = None
    """What the page says that its commands print; None where it says nothing."""


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order; those of output belong to the block before them."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for m in _BLOCK.finditer(text):
        if m["prints"]:
            found[-1] = replace(found[-1], prints=m["text"])
            continue
        line = text[: m.start()].count("\n") + 1
        found.append(Block(line, m["kind"], m["text"], m["words"] or ""))
    return found


def unrun(page: Path) -> list[str]:
    """Commands outside of ``sh`` blocks that look as if one could type them."""
    return [
        f"{page.name}:{block.line}: {line}"
        for block in blocks(page)
        if block.kind != "sh"
        for line in block.text.splitlines()
        if _COMMAND.match(line) and not _FORM.search(line.split("  ")[0])
    ]
