"""Prepares a process for the stand-in device when Python starts, before torch is imported."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

_HERE = str(Path(__file__).parent)


def _others() -> None:
    """Another ``sitecustomize`` further down the path runs as it would without this one."""
    path = [place for place in sys.path if os.path.abspath(place or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("STANDIN_MODE") and "libstandin" in os.environ.get("LD_PRELOAD", ""):
    from mprog_standin import install

    install(os.environ["STANDIN_MODE"])
_others()
