"""The page of the configuration is the schema's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "docs"))
import configuration_page  # noqa: E402


def test_the_page_is_not_stale() -> None:
    command = [sys.executable, "tools/docs/configuration_page.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stale_page_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "configuration.md"
    stale.write_text(configuration_page.page().replace("Peak learning rate", "Learning rate"))
    monkeypatch.setattr(configuration_page, "PAGE", stale)
    monkeypatch.setattr(sys, "argv", ["configuration_page.py", "--check"])
    assert configuration_page.main() == 1
    assert "is stale" in capsys.readouterr().err


def test_every_key_has_its_meaning() -> None:
    section, without = "", []
    for line in configuration_page.page().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| `") and not line.split("|")[4].strip():
            without.append(f"{section}: {line}")
    # keys of a layout that change at an expansion mean what they mean in it
    assert not [line for line in without if not line.startswith("expansion[].parallel: ")]
