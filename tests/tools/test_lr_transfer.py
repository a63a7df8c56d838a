"""The tool that measures learning-rate transfer: its grid, what it reads off it, resuming."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_progressive import data

FILE = Path(__file__).resolve().parents[2] / "tools" / "lr_transfer.py"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lr_transfer", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> list[Any]:
    """Cells that were trained: the loss is least at 0.02 with muP, and at 0.02 x depth without."""
    trained = []

    def loss(config: Any) -> float:
        trained.append((config.model.hidden_size, config.model.num_layers, config.optim.lr))
        best = 0.02 if config.model.mup else 0.02 * config.model.num_layers
        return 3 + abs(config.optim.lr / best - 1)

    monkeypatch.setattr(tool, "final_loss", loss)
    monkeypatch.setattr(tool, "world_group", lambda _: nullcontext())
    monkeypatch.setattr(data, "prepare", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["lr_transfer", str(out), *words])
    assert tool.main() == 0
    return trained


def test_grid_resumes_and_reads_the_best_rate(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["--depths", "1", "2", "4", "--widths", "64", "128"]
    trained = run(tool, monkeypatch, tmp_path, *words)
    assert len(trained) == len(set(trained)) * 2 == 4 * 5 * 2  # depths 1, 2, 4 and width 128
    assert run(tool, monkeypatch, tmp_path, *words) == []
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    assert len(run(tool, monkeypatch, tmp_path, *words)) == 3
    text = (tmp_path / "lr_transfer.md").read_text()
    assert "mup: the best learning rate moves by a factor of 1 (0 grid steps) over 4 shapes" in text
    assert "standard: the best learning rate moves by a factor of 4 (2 grid steps)" in text
    assert "at the edge of the grid for 64x4" in text
    assert (tmp_path / "lr_transfer.png").stat().st_size > 10_000
    assert json.loads(lines[0])["steps"] == 200


def test_interpolated_best_rate_is_that_of_a_parabola(tool: ModuleType) -> None:
    rates = [0.01 * 2**i for i in range(5)]
    points = [(lr, 3 + 0.1 * math.log2(lr / 0.033) ** 2) for lr in rates]
    assert tool.interpolated(points) == pytest.approx(0.033)
    assert tool.interpolated([(lr, lr) for lr in rates]) is None
    assert tool.interpolated([(0.01, 5.0), (0.02, 4.0), (0.04, tool.SPECIAL)]) is None


def test_other_base_configuration_is_another_cell(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["--product", "--depths", "1", "--widths", "64", "--lrs", "0.01", "0.02"]
    assert len(run(tool, monkeypatch, tmp_path, *words)) == 4
    assert len(run(tool, monkeypatch, tmp_path, "train.global_batch=16", *words)) == 4
    assert run(tool, monkeypatch, tmp_path, "data.prepared=elsewhere", *words) == []


def test_drawing_trains_nothing_and_takes_what_is_there(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(tool, monkeypatch, tmp_path, "--depths", "0", "2", "--widths", "64", "--arms", "mup")
    every = ["--product", "--depths", "0", "2", "4", "--widths", "64", "128"]
    assert run(tool, monkeypatch, tmp_path, *every, "--draw") == []
    text = (tmp_path / "lr_transfer.md").read_text()
    assert "over 2 shapes" in text
    assert "standard" not in text
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:-4]) + "\n")  # one rate of a shape
    assert run(tool, monkeypatch, tmp_path, *every, "--draw") == []
    assert "over 1 shapes" in (tmp_path / "lr_transfer.md").read_text()


def test_workers_share_the_cells(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["--product", "--depths", "1", "2", "--widths", "64", "128", "--workers", "3"]
    trained = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        mine = run(tool, monkeypatch, tmp_path, *words, "--worker")
        trained += mine
        assert len(mine) in (13, 14)
    assert len(trained) == 2 * 4 * 5
    started: list[Any] = []
    monkeypatch.setattr(tool, "run_workers", lambda command, n: started.append((command, n)) or 0)
    assert run(tool, monkeypatch, tmp_path, *words) == []
    assert [(n, command[-1]) for command, n in started] == [(3, "--worker")]
    assert "over 4 shapes" in (tmp_path / "lr_transfer.md").read_text()


def test_product_has_every_pair(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["--product", "--depths", "1", "2", "--widths", "64", "128", "--arms", "mup"]
    trained = run(tool, monkeypatch, tmp_path, *words, "--lrs", "0.01", "0.02")
    assert list(dict.fromkeys((w, d) for w, d, _ in trained)) == [
        (64, 1), (64, 2), (128, 1), (128, 2)
    ]  # fmt: skip
