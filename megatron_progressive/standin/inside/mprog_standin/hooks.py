"""Calling a function once a module has been imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Prepare = Callable[[ModuleType], None]
_AFTER: dict[str, list[Prepare]] = {}


def after(name: str, prepare: Prepare) -> None:
    """``prepare(module)`` once the module ``name`` has been executed; now if it has been."""
    if name in sys.modules:
        prepare(sys.modules[name])
        return
    _AFTER.setdefault(name, []).append(prepare)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Loader(importlib.abc.Loader):
    """The module's own loader, and then what waits for it."""

    def __init__(self, inner: Any, name: str) -> None:
        self._inner, self._name = inner, name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        for prepare in _AFTER.pop(self._name, []):
            prepare(module)

    def __getattr__(self, name: str) -> Any:  # resources and sources are asked of loaders as well
        return getattr(self._inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _AFTER:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, fullname)
                return spec
        return None
