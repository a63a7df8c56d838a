"""The first day on a GPU keeps to its limits and keeps what it has; its sections are short programs
here."""

from __future__ import annotations

import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "gpu"
sys.path.insert(0, str(TOOLS))
import first_day  # noqa: E402
import page  # noqa: E402

RESULT = """import json, os
line = json.dumps({"part": "smoke", "what": "a kernel", "relative_error": 1e-3})
open(os.environ["MPROG_RESULTS"], "a").write(line + "\\n")
"""
CHILD = "import subprocess, sys, time\np = subprocess.Popen([sys.executable, '-c', 'import time; " \
    "time.sleep(300)'])\nopen({file!r}, 'w').write(str(p.pid))\ntime.sleep(300)"  # fmt: skip


def program(name: str, limit_s: float, text: str) -> first_day.Section:
    return first_day.Section(name, limit_s, (sys.executable, "-c", text))


def day_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *sections: Any) -> dict[str, Any]:
    monkeypatch.setattr(first_day, "SECTIONS", sections)
    monkeypatch.setattr(sys, "argv", ["first_day.py", str(folder)])
    code = first_day.main()
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {**found, "exit": code, "files": sorted(p.name for p in folder.iterdir())}


def test_a_day_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"
    out = tmp_path / "out"
    broken = RESULT.replace('line + "\\n"', "line[:20]") + "raise SystemExit(3)"
    found = day_of(
        out, monkeypatch,
        program("good", 30, RESULT), program("hangs", 2, CHILD.format(file=str(pid))),
        program("breaks", 30, broken),
    )  # fmt: skip
    assert [s["exit"] for s in found["sections"]] == [0, 124, 3]
    assert found["exit"] == 1
    assert [r["what"] for r in found["results"]] == ["a kernel"]  # not the one that was cut off
    assert found["files"] == ["logs.txt.gz", "page.md", "results.json"]
    text = (out / "page.md").read_text()
    assert "| hangs | past its limit | 2 | 2 |" in text
    assert "| a kernel | 1.0e-03 |" in text
    with gzip.open(out / "logs.txt.gz", "rt") as log:
        assert "===== hangs" in log.read()
    assert not psutil.pid_exists(int(pid.read_text())) or (
        psutil.Process(int(pid.read_text())).status() == psutil.STATUS_ZOMBIE
    )


def test_results_are_whole_after_every_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a day that is killed in its second section has left."""
    seen = tmp_path / "seen"
    look = f"import shutil; shutil.copytree({str(tmp_path / 'out')!r}, {str(seen)!r})"
    day_of(tmp_path / "out", monkeypatch, program("a", 30, RESULT), program("b", 30, look))
    assert [s["name"] for s in json.loads((seen / "results.json").read_text())["sections"]] == ["a"]
    assert "a kernel" in (seen / "page.md").read_text()


def test_no_section_begins_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_day, "TOTAL_S", first_day.LEAST_S + 0.5)
    late = "import time; time.sleep(1)"
    began = time.monotonic()
    found = day_of(tmp_path, monkeypatch, program("first", 60, late), program("second", 60, RESULT))
    assert time.monotonic() - began < 30
    assert [s["exit"] for s in found["sections"]] == [0, None]
    assert found["exit"] == 0
    assert "| second | left out, no time |" in (tmp_path / "page.md").read_text()


def test_the_page_has_a_row_for_each_kind_of_result() -> None:
    run = {"config": "configs/gpt2/124m_fixed.yaml", "words": ["kernels.transformer_engine=false"]}
    results: list[dict[str, Any]] = [
        {"part": "throughput", **run, "layers": 12, "micro_batch": 48, "step_s": 0.25,
         "tokens_per_s": 786432.0, "mfu": 0.4, "losses": [11.0, 10.5], "peak_gib": 30.0,
         "planned_gib": None, "left_gib": 0.0},
        {"part": "speedup", **run, "wall": 3.0, "flops": 4.0, "share": 0.75},
        {"part": "pause", **run, "init": "random", "from_layers": 0, "to_layers": 12,
         "seconds": 1.5, "parts": {"build": 0.5}, "before_gib": 1.0, "peak_gib": 3.0,
         "after_gib": 2.0, "left_gib": 0.0, "loss": [5.0, 5.1]},
        {"part": "newton_schulz", "shape": [2, 8, 8], "dtype": "bf16", "symmetric": True,
         "ms": 0.5, "tflops": 300.0, "relative_error": 1e-2},
        {"part": "newton_schulz", "shape": [2, 8, 8], "dtype": "fp16", "symmetric": False,
         "error": "RuntimeError: no"},
        {"part": "setting", **run, "setting": "kernels.rope=false", "step_s": 0.25},
    ]  # fmt: skip
    text = page.page(
        {
            "date": "2026-01-01",
            "commit": "abc",
            "rehearsal": True,
            "transformer_engine": False,
            "sections": [],
            "results": results,
        }
    )
    for row in (
        "Not rehearsed, since nothing here is a GPU",
        "its sections ran with local layers",
        "| gpt2 124m, local layers | 12 | 48 | 250.0 | 786,432 | 40.0 % | 30.00 | none |",
        "| gpt2 124m, local layers | 3.00 | 4.00 | 75 % |",
        "| 0 → 12 | 1.50 | build 0.50 | 1.00 | 3.00 | 2.00 | 0.00 | 5.0000 → 5.1000 |",
        "| 2 x 8 x 8 | bf16 | ours | 0.50 | 300 | 1.0e-02 |",
        "| 2 x 8 x 8 | fp16 | cuBLAS | RuntimeError: no |",
        "| kernels.rope=false | 250.0 |",
    ):
        assert row in text


def test_every_section_names_a_configuration_that_is_there() -> None:
    for section in first_day.SECTIONS:
        for word in section.command:
            assert not word.startswith("configs/") or (first_day.ROOT / word).is_file()
    assert sum(section.limit_s for section in first_day.SECTIONS[:4]) < first_day.TOTAL_S
