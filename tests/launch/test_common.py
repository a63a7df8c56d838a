"""launch/common.sh without Slurm: warnings at every moment, a controller that does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each of its first FAILURES calls fails, as under load; all are written down.
SCONTROL = """#!/bin/bash
echo "$@" >> {folder}/scontrol.log
[ "$(wc -l < {folder}/scontrol.log)" -gt {failures} ]
"""

# A run: takes the warning once it is ready, then saves for a while. Nothing is parsed after
# "ready": bash 5.2 loses a signal that comes while it parses $(…).
CHILD = """
trap 'sleep 0.3; echo saved; exit 75' USR1
trap 'echo killed; exit 1' TERM
{
    echo ready
    for i in {1..100}; do sleep 0.1; done
    exit 3
}
"""


def start(folder: Path, body: str, failures: int = 0, **environment: str) -> subprocess.Popen[str]:
    """A job's script that runs ``body`` after sourcing common.sh."""
    scontrol = folder / "scontrol"
    scontrol.write_text(SCONTROL.format(folder=folder, failures=failures))
    scontrol.chmod(0o755)
    (folder / "child.sh").write_text(CHILD)
    script = f"set -euo pipefail\nsource {ROOT}/launch/common.sh\necho sourced\n{body}"
    return subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
             **environment},
    )  # fmt: skip


def warn_after(process: subprocess.Popen[str], line: str, number: signal.Signals) -> str:
    """Send a warning once ``line`` has been printed; returns the rest of the output."""
    assert process.stdout is not None
    for got in process.stdout:
        if got.strip() == line:
            break
    process.send_signal(number)
    return process.communicate(timeout=120)[0]


def requeued(folder: Path) -> list[str]:
    path = folder / "scontrol.log"
    return path.read_text().splitlines() if path.is_file() else []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warned_run_saves_and_is_requeued(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, f"mprog_run bash {tmp_path}/child.sh; echo not reached")
    rest = warn_after(process, "ready", number)
    assert "saved" in rest
    assert "not reached" not in rest
    assert (process.returncode, requeued(tmp_path)) == (75, ["requeue 7"])


def test_a_second_warning_while_it_saves(tmp_path: Path) -> None:
    process = start(tmp_path, f"mprog_run bash {tmp_path}/child.sh")
    assert process.stdout is not None
    assert next(process.stdout).strip() == "sourced"
    assert next(process.stdout).strip() == "ready"
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
        time.sleep(0.05)
    assert "saved" in process.communicate(timeout=120)[0]
    assert (process.returncode, requeued(tmp_path)) == (75, ["requeue 7"])


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("sleep 0.5; mprog_run sleep 60", "sourced"),  # before the command
        ("mprog_run bash -c 'echo on; exec sleep 60'", "on"),  # before the command can take it
    ],
)
def test_warned_before_the_run_can_save(tmp_path: Path, body: str, line: str) -> None:
    process = start(tmp_path, body)
    warn_after(process, line, signal.SIGUSR1)
    assert (process.returncode, requeued(tmp_path)) == (75, ["requeue 7"])


def test_warned_after_the_run(tmp_path: Path) -> None:
    """The rest of the script is done: the job is not failed by its own warning."""
    process = start(tmp_path, "mprog_run true; echo ran; sleep 0.5; echo collected")
    assert "collected" in warn_after(process, "ran", signal.SIGUSR1)
    assert (process.returncode, requeued(tmp_path)) == (0, [])


def test_a_run_that_fails_is_not_requeued(tmp_path: Path) -> None:
    process = start(tmp_path, "mprog_run bash -c 'exit 3'")
    process.communicate(timeout=120)
    assert (process.returncode, requeued(tmp_path)) == (3, [])


def test_a_slow_controller_is_asked_again(tmp_path: Path) -> None:
    process = start(tmp_path, "mprog_run bash -c 'exit 75'", failures=2)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert requeued(tmp_path) == ["requeue 7"] * 3


def test_a_task_of_an_array_requeues_itself_only(tmp_path: Path) -> None:
    """The number of the last task is that of the whole array."""
    process = start(tmp_path, "mprog_run bash -c 'exit 75'",
                    SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")  # fmt: skip
    process.communicate(timeout=120)
    assert requeued(tmp_path) == ["requeue 7_2"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "/home/grid.yaml"),
        ("train.steps=3", "/home/grid.yaml train.steps=3"),
        ("mine.yaml train.steps=3", "mine.yaml train.steps=3"),
    ],
)
def test_the_file_is_optional(tmp_path: Path, words: str, expected: str) -> None:
    body = f'mprog_defaults grid.yaml {words}; echo "${{mprog_words[*]}}"'
    process = start(tmp_path, body, MPROG_HOME="/home")
    assert process.communicate(timeout=60)[0].splitlines()[1] == expected
