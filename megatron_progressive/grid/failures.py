"""Whose failure a try of a cell was: its own, which counts, or of the place where it was started.

A cell's own is what its run says of itself once it has begun, or what is wrong with its
configuration or its data. Of the place are a missing ``srun``, another interpreter, variables of
the scheduler, ranks that do not fit the layout, ranks that do not find each other: the cell can
do nothing for them, and runs elsewhere.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

CONFIG_CODE = 2
"""Exit code of a refusal, and of much else: shells, interpreters and ``srun`` use it too."""
NO_PROGRAM_CODE = 127
"""Exit code of shells and launchers for a program that is not there; 126 for one that cannot be
executed."""

# What this program's own processes say at their end, perhaps behind a rank's number of srun --label
_SAID = re.compile(r"^(?:\d+: ?)?(mprog: .+|rank \d+: .+)$", re.MULTILINE)
_OWN = re.compile(r"mprog: (?:run|model|data|train|optim|schedule|expansion)\b")
_LAYOUT = re.compile(
    r"mprog: (?:(?:expansion\[\d+\]\.)?parallel\b|train\.global_batch:|train\.micro_batch:"
    r"|kernels\.|optim\.ns_kernel_from:)"
)
"""What a cell's configuration was checked for when the grid was read, but for the ranks and the
devices that are here."""
_WRITING = re.compile(r"mprog: run\.dir:")
_IN_USE = re.compile(r"mprog: run\.name: .* is in use by ")
_OTHERS_DOING = re.compile(r"rank \d+: (?:Dist\w*Error:|killed by )")
"""Of a run that has not begun: its ranks did not meet, or somebody ended them."""
_NOT_INSTALLED = re.compile(r"No module named ['\"]?megatron_progressive")


@dataclass(frozen=True)
class Failure:
    """How a try ended that did not finish the run."""

    line: str
    """The cause, in one line."""
    own: bool = False
    """Whether it counts against the cell."""
    final: bool = False
    """Whether trying again, here, ends in the same way."""
    everywhere: bool = False
    """Whether no other cell can be started here either."""
    in_use: bool = False
    """Whether another job has the run."""


def judge(code: int, text: str, begun: bool) -> Failure:
    """What a try's end means.

    Args:
        code: its exit code; negative: the signal that killed it.
        text: what it printed.
        begun: whether its run began, by the run's folder.
    """
    said = [match[1] for match in _SAID.finditer(text)]
    # of ranks the first one that failed: the others lost it
    line = said[0] if said else _last(text, code)
    refused = code == CONFIG_CODE and line.startswith("mprog: ")
    if refused and _IN_USE.match(line):
        return Failure(line, in_use=True)
    if refused and _LAYOUT.match(line):
        return Failure(line, final=True)
    if refused and _OWN.match(line) and not _WRITING.match(line):
        return Failure(line, own=True, final=True)
    if begun or (line.startswith("rank ") and said and not _OTHERS_DOING.match(line)):
        return Failure(line, own=True)
    # without a word of this program it is not there, or what should start it is not
    gone = code in (126, NO_PROGRAM_CODE) or _NOT_INSTALLED.search(text) is not None
    final = gone or code == CONFIG_CODE
    return Failure(line, final=final, everywhere=final)


def _last(text: str, code: int) -> str:
    """The last line of what it printed, with its exit code where that says more."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if not code:
        return "ended without a final validation loss that is a number"
    return lines[-1] if lines else f"exit code {code} without a word"
