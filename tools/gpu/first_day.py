"""Runs the sections of the first day on a GPU, each in a process of its own with a time limit.

Results are JSON lines that the sections append to ``OUT/results.jsonl``; after every section
``OUT/results.json`` and ``OUT/page.md`` are written whole, so that a day that is cut short keeps
what it has. Called by ``first_day.sh``.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parents[1]
USUAL_S = 480.0
TOTAL_S = float(os.environ.get("MPROG_FIRST_DAY_S", USUAL_S))
LEAST_S = 15.0
"""A section that would have less time than this is left out."""

TRANSFORMER_ENGINE = "MPROG_TRANSFORMER_ENGINE"
"""Names a folder with Transformer Engine's wheels unpacked, for a rehearsal."""

MEASURE = (sys.executable, str(TOOLS / "measure.py"))
SMALL, MIDDLE = "configs/gpt2/124m_fixed.yaml", "configs/llama3/0.5b_progressive.yaml"
LARGE, EXPERTS = "configs/llama3/1b_progressive.yaml", "configs/deepseek_v3/0.2b_progressive.yaml"
LLAMA_VOCABULARY = "data.vocab_size=128256"  # no tokenizer is loaded
GPT2_VOCABULARY = "data.vocab_size=50257"
LOCAL = "kernels.transformer_engine=false"


@dataclass(frozen=True)
class Section:
    """One process of the day."""

    name: str
    limit_s: float
    command: tuple[str, ...]
    computes: bool = False
    """Whether its numbers are the point: in a rehearsal the stand-in then does arithmetic."""


def measure(name: str, limit_s: float, *words: str) -> Section:
    return Section(name, limit_s, (*MEASURE, *words))


PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/gpu")
SECTIONS = (
    Section("environment", 30, (sys.executable, "-m", "megatron_progressive", "env")),
    Section("kernels are right", 45, (*MEASURE, "smoke"), computes=True),
    Section("tests/gpu", 150, PYTEST, computes=True),
    measure("throughput, GPT-2 124M", 75, "throughput", SMALL, "12", "48", GPT2_VOCABULARY),
    measure("throughput, LLaMA 3 1B", 75, "throughput", LARGE, "24", "4", LLAMA_VOCABULARY),
    measure("throughput, DeepSeek-V3 0.2B", 90, "throughput", EXPERTS, "12", "4", GPT2_VOCABULARY),
    measure("pause, GPT-2 124M", 45, "pause", SMALL, "12", "random", GPT2_VOCABULARY),
    measure("pause, LLaMA 3 1B", 60, "pause", LARGE, "24", "copying", LLAMA_VOCABULARY),
    measure("Newton-Schulz", 40, "newton_schulz"),
    measure("throughput, local, GPT-2 124M", 60, "throughput", SMALL, "12", "48",
            GPT2_VOCABULARY, LOCAL),
    measure("throughput, local, LLaMA 3 1B", 60, "throughput", LARGE, "24", "4",
            LLAMA_VOCABULARY, LOCAL),
    measure("throughput, LLaMA 3 0.5B", 60, "throughput", MIDDLE, "24", "4", LLAMA_VOCABULARY),
    measure("settings, LLaMA 3 0.5B", 75, "settings", MIDDLE, "24", "4", LLAMA_VOCABULARY),
    measure("settings, DeepSeek-V3 0.2B", 110, "settings", EXPERTS, "12", "4", GPT2_VOCABULARY),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a section ended."""

    name: str
    exit: int | None
    """Exit code; None where there was no time for it. 124: it ran past its limit."""
    seconds: float
    limit_s: float


class Day:
    """The results so far, in a folder."""

    def __init__(self, out: Path, rehearsal: bool = False) -> None:
        self.out, self.rehearsal = out, rehearsal
        self.lines = out / "results.jsonl"
        self.log = out / "logs.txt"
        self.outcomes: list[Outcome] = []
        for stale in (self.lines, self.log):
            stale.unlink(missing_ok=True)

    def run(self, section: Section, left_s: float) -> None:
        if left_s < LEAST_S:
            self._note(Outcome(section.name, None, 0.0, section.limit_s))
            return
        # more time for all, as a slow machine needs for a rehearsal, is more for each
        limit = min(section.limit_s * max(1.0, TOTAL_S / USUAL_S), left_s)
        began = time.monotonic()
        environment = {
            **os.environ,
            "MPROG_RESULTS": str(self.lines),
            "MPROG_SECTION": section.name,
        }
        command = section.command
        if self.rehearsal:
            command = _rehearsed(section)
            folder = os.environ.get(TRANSFORMER_ENGINE)
            if folder and section.computes:  # its own calls cannot be counted yet
                environment["PYTHONPATH"] = f"{environment.get('PYTHONPATH', ROOT)}:{folder}"
        with self.log.open("a") as log:
            log.write(f"===== {section.name}: {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = 124
            finally:
                _end(process)
        self._note(Outcome(section.name, code, time.monotonic() - began, limit))

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        ended = "left out, no time" if outcome.exit is None else f"exit {outcome.exit}"
        print(f"{outcome.name}: {ended}, {outcome.seconds:.0f} of {outcome.limit_s:.0f} s",
              flush=True)  # fmt: skip
        self.write()

    def results(self) -> list[dict[str, object]]:
        """The lines of all sections; one that was cut off while it was written is left out."""
        found = []
        for line in self.lines.read_text().splitlines() if self.lines.exists() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def write(self) -> None:
        from page import page

        whole = {
            "date": time.strftime("%Y-%m-%d"),
            "rehearsal": self.rehearsal,
            "transformer_engine": not self.rehearsal or TRANSFORMER_ENGINE in os.environ,
            "commit": _commit(),
            "sections": [asdict(outcome) for outcome in self.outcomes],
            "results": self.results(),
        }
        _replace(self.out / "results.json", json.dumps(whole, indent=1) + "\n")
        _replace(self.out / "page.md", page(whole))
        if self.log.exists():
            with self.log.open("rb") as text, gzip.open(self.out / "logs.txt.gz", "wb") as packed:
                shutil.copyfileobj(text, packed)


def _rehearsed(section: Section) -> tuple[str, ...]:
    """The section's command on the stand-in device."""
    mode = "computing" if section.computes else "counting"
    standin = (sys.executable, "-m", "megatron_progressive.standin", "--mode", mode)
    return (*standin, "--gib", "139", "--", *section.command)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a section and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _replace(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def _commit() -> str:
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "not a checkout"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the results, made if it is not there")
    parser.add_argument("--spent", type=float, default=0.0, help="seconds that installing took")
    parser.add_argument(
        "--rehearse", action="store_true",
        help="run on the stand-in device, without a GPU: what is measured says nothing then",
    )  # fmt: skip
    parser.add_argument("--only", help="run the sections whose names contain this")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic() - args.spent
    day = Day(args.out, args.rehearse)
    for section in SECTIONS:
        if args.only is None or args.only in section.name:
            day.run(section, TOTAL_S - (time.monotonic() - began))
    day.log.unlink(missing_ok=True)
    day.lines.unlink(missing_ok=True)
    return int(any(outcome.exit for outcome in day.outcomes))


if __name__ == "__main__":
    sys.path.insert(0, str(TOOLS))
    sys.exit(main())
