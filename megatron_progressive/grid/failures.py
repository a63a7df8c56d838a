"""Whose failure a try of a cell was: the cell's own, which counts, or that of the place where it
was started.

A failure is the cell's own where its run has begun and says so, or where its configuration or its
data is wrong. It is that of the place where ``srun`` is missing, the interpreter or the scheduler's
variables are wrong, or ranks do not fit the layout or do not find each other: the cell is not to
blame for these, and runs elsewhere.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

CONFIG_CODE = 2
"""The exit code of a refusal, and of much else: shells, interpreters and ``srun`` use it, too."""
NO_PROGRAM_CODE = 127
"""The exit code of shells and launchers for a program that is not there; 126 is that for one that
cannot be executed."""

# What this program's own processes say at their end, perhaps behind a rank's number of srun --label
_SAID = re.compile(r"^(?:\d+: ?)?(mprog: .+|rank \d+: .+)$", re.MULTILINE)
_OWN = re.compile(r"mprog: (?:run|model|data|train|optim|schedule|expansion)\b")
_LAYOUT = re.compile(
    r"mprog: (?:(?:expansion\[\d+\]\.)?parallel\b|train\.global_batch:|train\.micro_batch:"
    r"|kernels\.|optim\.ns_kernel_from:)"
)
"""What could not be checked when the grid was read: a layout against the ranks and the devices that
are here."""
_WRITING = re.compile(r"mprog: run\.dir:")
_IN_USE = re.compile(r"mprog: run\.name: .* is in use by ")
_OTHERS_DOING = re.compile(r"rank \d+: (?:Dist\w*Error:|killed by )")
"""What ends a run that has not begun although it is sound: its ranks did not meet, or somebody
ended them."""
_NOT_INSTALLED = re.compile(r"No module named ['\"]?megatron_progressive")


@dataclass(frozen=True)
class Failure:
    """How a try ended that did not finish the run."""

    line: str
    """The cause, in one line."""
    own: bool = False
    """Whether it counts against the cell."""
    final: bool = False
    """Whether trying again in this place ends in the same way."""
    everywhere: bool = False
    """Whether no other cell can be started in this place either."""
    in_use: bool = False
    """Whether another job has the run."""


def judge(code: int, text: str, begun: bool) -> Failure:
    """What the end of a try means.

    Args:
        code: the exit code of the try; a negative one is the signal that killed it.
        text: what the try printed.
        begun: whether its run has begun, as the run's folder tells.
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
    """The last line of what a try printed, with its exit code where that says more."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if not code:
        return "ended without a final validation loss that is a number"
    return lines[-1] if lines else f"exit code {code} without a word"
