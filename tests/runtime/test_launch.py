"""Signals that come before a worker can save: one line, and the exit code that a shell gives."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

# Two workers that only wait; each makes a file once it is there.
LAUNCHER = """
import sys
from megatron_progressive.runtime.launch import run_workers
worker = "import os, sys, time; open(sys.argv[1] + os.environ['RANK'], 'w'); time.sleep(600)"
sys.exit(run_workers([sys.executable, "-c", worker, sys.argv[1]], 2))
"""


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGINT, "mprog: interrupted"),
        (signal.SIGTERM, "mprog: ended by SIGTERM before it could save"),
        (signal.SIGHUP, "mprog: ended by SIGHUP before it could save"),
    ],
)
def test_workers_that_cannot_save_yet(tmp_path: Path, number: signal.Signals, line: str) -> None:
    job = subprocess.Popen([sys.executable, "-c", LAUNCHER, f"{tmp_path}/"], cwd=ROOT,
                           stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline, job.poll()
        time.sleep(0.02)
    job.send_signal(number)
    _, said = job.communicate(timeout=60)
    assert (job.returncode, said.splitlines()) == (128 + number, [line])


@pytest.mark.parametrize("seconds", [0.4, 1.0, 2.5])
def test_ctrl_c_while_it_starts(corpus: Path, tmp_path: Path, seconds: float) -> None:
    """At any moment: there is no traceback."""
    values = {"run": {"dir": str(tmp_path)}, "model": {"family": "gpt2", "preset": "tiny"},
              "data": {"prepared": str(corpus), "vocab_size": 512, "sequence_length": 32},
              "train": {"steps": 1_000_000}}  # fmt: skip
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(values))
    # as soon as the interpreter itself is there
    code = ("import sys; print('here', flush=True); from megatron_progressive.__main__ import main;"
            "sys.exit(main())")  # fmt: skip
    job = subprocess.Popen([sys.executable, "-c", code, "train", str(tmp_path / "in.yaml")],
                           cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)  # fmt: skip
    assert job.stdout is not None
    assert job.stdout.readline() == "here\n"
    time.sleep(seconds)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=120)
    if job.returncode == 75:  # a quick machine: it had begun to train
        return
    # Python itself ends by the signal where an extension's import was interrupted
    assert job.returncode in (130, -signal.SIGINT)
    assert said.splitlines()[-1] == "mprog: interrupted"
    assert "Traceback" not in said
