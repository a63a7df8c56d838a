"""The house: imports point down the list of rooms, files of a room form no circle, and no room or
file is too large to be one concern."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_progressive"
ROOMS = [
    {"__main__"},
    {"cli"},
    {"grid", "coordcheck"},
    {"compare"},
    {"train", "laws", "hub"},
    {"plan", "runs", "evaluation"},
    {"cost", "expansion", "huggingface"},
    {"engines", "checkpoints"},
    {"optim", "reshard", "data"},
    {"pictures"},
    {"models", "runtime"},
    {"config", "standin"},
    {"__init__"},
]
"""A room may import those of the lines below its own, and no other."""
HEIGHT = {room: -line for line, rooms in enumerate(ROOMS) for room in rooms}

LARGEST_ROOM = 0.15
"""Of the package's lines."""
LONGEST_FILE = 400
"""Lines."""


def module(path: Path) -> str:
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def files() -> dict[str, Path]:
    return {module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(source: str) -> set[str]:
    """The package's modules that a source imports: inside functions and for types alone, too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in files() else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith(f"{PACKAGE.name}.")}
    return found


def test_imports_point_down() -> None:
    assert {room(name) for name in files()} == HEIGHT.keys()
    upward = [
        f"{name} imports {other}"
        for name, path in files().items()
        for other in imported(path.read_text())
        if room(other) != room(name) and HEIGHT[room(other)] >= HEIGHT[room(name)]
    ]
    assert not upward


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of some circle, in its order; empty where there is none."""
    done: set[str] = set()

    def below(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return []
        for other in sorted(imports.get(name, set()) - {name}):
            if found := below(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in imports if (found := below(name, []))), [])


def test_no_circles() -> None:
    assert not circle({name: imported(path.read_text()) for name, path in files().items()})


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    inside = "def f():\n    from megatron_progressive.config import loading"
    assert imported(inside) == {"megatron_progressive.config.loading"}


def test_no_room_and_no_file_is_too_large() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in files().items()}
    rooms: Counter[str] = Counter()
    for name, count in lines.items():
        rooms[room(name)] += count
    whole = sum(lines.values())
    assert not {one: count for one, count in rooms.items() if count > LARGEST_ROOM * whole}
    assert not {name: count for name, count in lines.items() if count > LONGEST_FILE}


def test_every_room_says_what_it_is_for() -> None:
    for name, path in files().items():
        assert ast.get_docstring(ast.parse(path.read_text())), name


def test_policies_and_engines_do_not_know_each_other() -> None:
    """expansion sees the Engine protocol only; engines cannot see expansion, which is above."""
    for file in (PACKAGE / "expansion").rglob("*.py"):
        engines = {name for name in imported(file.read_text()) if room(name) == "engines"}
        assert engines <= {"megatron_progressive.engines.base"}


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
