"""Megatron-core's indexed dataset, imported when it is first needed (that takes seconds)."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from types import ModuleType


def indexed_dataset() -> ModuleType:
    """The module ``megatron.core.datasets.indexed_dataset``. It needs neither CUDA nor a shim.

    Where the process also trains without CUDA, ``runtime.cpu.install`` must come before the
    first call: what it sets is read when Megatron-core is imported.
    """
    name = "megatron.core.datasets.indexed_dataset"
    if name in sys.modules:
        return sys.modules[name]
    compiler = logging.getLogger("torch.utils.cpp_extension")
    level = compiler.level
    compiler.setLevel(logging.ERROR)  # it tells that there is no CUDA, which is no matter here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing parts of Megatron-core: no matter either
            return importlib.import_module(name)
    finally:
        compiler.setLevel(level)
