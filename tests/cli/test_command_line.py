"""The command line: numbers out of range, errors in one line, terminals without τ."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli

ROOT = Path(__file__).resolve().parents[2]
DEMO, GRID = str(ROOT / "configs" / "demo.yaml"), str(ROOT / "configs" / "grids" / "gpt2_tiny.yaml")

COUNTS = [
    (["train", DEMO], "--nproc"), (["plan", DEMO], "--nproc"), (["plan", DEMO], "--gpus"),
    (["pilot", DEMO], "--nproc"), (["coordcheck", DEMO], "--steps"),
    (["grid", "run", GRID], "--nproc"), (["grid", "run", GRID], "--workers"),
    (["grid", "pilot", GRID], "--workers"), (["grid", "submit", GRID], "--nodes"),
    (["grid", "submit", GRID], "--array-limit"),
]  # fmt: skip
NUMBERS = [
    (["plan", DEMO], "--link-gb-per-s"), (["plan", DEMO, "--gpu", "h100"], "--gpu-memory-gib"),
    (["plan", DEMO, "--gpu", "h100"], "--peak-tflops"), (["plan", DEMO, "--gpu", "h100"], "--mfu"),
    (["pilot", DEMO], "--steps"), (["pilot", DEMO], "--at"), (["coordcheck", DEMO], "--slope"),
]  # fmt: skip


def refused(words: list[str], capfd: Any) -> str:
    """Assert exit code 2 without output; returns the line on standard error."""
    assert cli.main(words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return str(line)


@pytest.mark.parametrize(("words", "option"), COUNTS + NUMBERS)
def test_no_number_is_out_of_range(words: list[str], option: str, capfd: Any) -> None:
    bad = ["0", "-1", "x", "", "nan", "9" * 5000 if (words, option) in COUNTS else "inf"]
    bad += ["1.5", "1e3", "٣"] if (words, option) in COUNTS else ["1e999"]
    for value in bad:
        for given in ([option, value], [f"{option}={value}"]):
            line = refused([*words, *given], capfd)
            assert line.startswith("mprog: --"), line
            assert option in line
            assert f"got {value[:60]!r}".rstrip("'") in line
            assert "accepted: a" in line
            assert len(line) < 300


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "COMMAND: invalid choice: 'trian'"),
        (["grid", "run", GRID, "--srun", "'"], '--srun: got "\'": No closing quotation; accepted'),
        (
            ["coordcheck", DEMO, "--widths", "64,9" + "0" * 99],
            "two or more sizes from 1 to 1048576",
        ),
        (["pilot", DEMO, "run.name=" + "x" * 240], "run.name of a pilot: got 'xxx"),
        (["train"], "the following arguments are required: CONFIG"),
        (["train", DEMO, "--gpu", "a100"], "unrecognized arguments: --gpu"),
        (["report", DEMO, "--out"], "--out: expected one argument"),
        (["export", "onnx"], "FORMAT: invalid choice: 'onnx'"),
    ],
)
def test_words_that_make_no_command(words: list[str], said: str, capfd: Any) -> None:
    assert said in refused(words, capfd)


HELP = ["", "train", "plan", "pilot", "env", "coordcheck", "report", "data", "checkpoint", "export",
        "import", "grid", "grid plan", "grid pilot", "grid run", "grid submit", "grid status",
        "grid report"]  # fmt: skip


def test_help_on_a_terminal_without_tau(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ""
    for words in HELP:
        screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", screen)
        with pytest.raises(SystemExit, match="0"):
            cli.main([*words.split(), "--help"])
        screen.flush()
        said += screen.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "proposes tau" in said


def test_output_and_files_where_nothing_is_utf8(tmp_path: Path) -> None:
    """A plan with τ and →, and a configuration with them in its comments."""
    file = tmp_path / "in.yaml"
    file.write_text("# τ → 0.8\n" + Path(DEMO).read_text(encoding="utf-8"), encoding="utf-8")
    plain = {
        "PYTHONIOENCODING": "ascii",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "megatron_progressive", "plan", str(file)],
        capture_output=True, env={**os.environ, **plain}, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert "->" in done.stdout.decode("ascii")
    assert "tau" in done.stdout.decode("ascii")
    page = tmp_path / "page.html"
    code = "from megatron_progressive.runtime.files import write_atomically as write; "
    code += f"from pathlib import Path; write(Path({str(page)!r}), chr(0x3c4))"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **plain}, cwd=ROOT, check=True)
    assert page.read_bytes() == "τ".encode()
