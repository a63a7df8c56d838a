"""Runs that wait for the test: ``staged/sitecustomize.py`` in their environment, and waits that
cost nothing while all is well."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_progressive.runs.folder import read_metrics
from tests.launch.cluster import DEADLINE_S

ROOT = Path(__file__).resolve().parents[2]
STAGED = Path(__file__).with_name("staged")

ENVIRONMENT = {"MPROG_PYTHON": sys.executable, "MPROG_HOME": str(ROOT),
               "PYTHONPATH": f"{STAGED}:{ROOT}", "OMP_NUM_THREADS": "1"}  # fmt: skip


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {DEADLINE_S} s"
        time.sleep(0.1)


def wait_for_step(folder: Path, step: int) -> None:
    until(lambda: any(e.get("step", 0) >= step for e in read_metrics(folder)), f"step {step}")


def resumes(folder: Path) -> list[int]:
    """Steps after which a run was gone on with."""
    return [e["step"] for e in read_metrics(folder) if e["event"] == "resume"]
