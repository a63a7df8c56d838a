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


PARALLEL_STATE = {"runtime/groups.py"}
"""The one module that knows Megatron-core's global process groups; engines ask it."""

# Who makes and ends process groups and chooses a device. Others may ask whether there is one.
CALLS = {
    "initialize_model_parallel": PARALLEL_STATE,
    "destroy_model_parallel": PARALLEL_STATE,
    "init_process_group": {"runtime/distributed.py"},
    "destroy_process_group": {"runtime/distributed.py", "runtime/groups.py"},
    "new_group": set(),
    "set_device": {"runtime/distributed.py"},
}


def touched(source: str) -> set[str]:
    """``parallel_state`` where a module imports it, reaches it as an attribute or names it in a
    string that is no docstring, and the functions of ``CALLS`` that it names in code."""
    found = set()
    tree = ast.parse(source)
    documentation = {
        id(node.value) for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }  # fmt: skip
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [] if id(node) in documentation else [node.value]
        for name in names:
            parts = set(name.split("."))
            found |= {"parallel_state"} & (parts | {"parallel_state" * ("mpu" in parts)})
            found |= CALLS.keys() & parts
    return found


def test_only_runtime_touches_parallel_state_and_devices() -> None:
    stand_ins = {("runtime/cpu.py", "set_device")}  # which it replaces, and never calls
    for file in sorted(PACKAGE.rglob("*.py")):
        relative = file.relative_to(PACKAGE).as_posix()
        for name in touched(file.read_text()):
            allowed = PARALLEL_STATE if name == "parallel_state" else CALLS[name]
            assert relative in allowed or (relative, name) in stand_ins, f"{relative}: {name}"


def test_every_way_to_parallel_state_is_seen() -> None:
    for source in (
        "from megatron.core import parallel_state",
        "from megatron.core import parallel_state as state",
        "from megatron.core import mpu",
        "from megatron.core.parallel_state import get_embedding_group",
        "import megatron.core.parallel_state",
        "import megatron.core as core\ncore.parallel_state.get_embedding_group()",
        "import importlib\nimportlib.import_module('megatron.core.parallel_state')",
        "def inside():\n    from megatron.core import parallel_state",
    ):
        assert touched(source) == {"parallel_state"}, source
    assert touched("import torch\ntorch.cuda.set_device(0)") == {"set_device"}
    assert touched("from torch.distributed import new_group") == {"new_group"}
    assert touched('"""Of ``parallel_state``: torch.cuda.set_device."""') == set()
