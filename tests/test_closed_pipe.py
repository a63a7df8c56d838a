"""A command whose reader ends early (``mprog plan … | head``) ends without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("words", [["plan", "configs/demo.yaml"], ["env"]])
def test_no_traceback(words: list[str]) -> None:
    command = [sys.executable, "-m", "megatron_progressive", *words]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert "Traceback" not in process.stderr.read()
    assert process.wait() == 1
