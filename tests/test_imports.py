"""Imports point one way: cli, then train and study, engines and expansion, state, optim, models
and data, runtime and config."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_progressive"
# A room may import rooms of its own height or lower; study never imports train (train counts
# its FLOPs with study's formulas), models, state and expansion know no engine's inside.
HEIGHT = {"cli": 6, "__main__": 7, "train": 5, "study": 4, "expansion": 3, "engines": 3,
          "state": 2, "optim": 2, "models": 2, "data": 2, "runtime": 1, "config": 1,
          "__init__": 0}  # fmt: skip


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                a.name.split(".")[1] for a in node.names if a.name.startswith(PACKAGE.name + ".")
            }
    return {name for name in names if name in HEIGHT}


def test_imports_point_one_way() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert {room(f) for f in files} <= HEIGHT.keys()
    upward = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in files
        for name in imported_rooms(file)
        if HEIGHT[name] > HEIGHT[room(file)]
    ]
    assert not upward


def test_policies_and_engines_do_not_know_each_other() -> None:
    """expansion sees the Engine protocol only; engines never see expansion or study."""
    for file in (PACKAGE / "expansion").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and ".engines" in (node.module or ""):
                assert node.module == "megatron_progressive.engines.base"
    for file in (PACKAGE / "engines").rglob("*.py"):
        assert not imported_rooms(file) & {"expansion", "train", "study"}


def test_only_runtime_touches_parallel_state_and_devices() -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        if room(file) == "runtime":
            continue
        text = file.read_text()
        assert "initialize_model_parallel" not in text
        assert "destroy_model_parallel" not in text
