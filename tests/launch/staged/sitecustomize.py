"""On PYTHONPATH of a job's processes: runs that wait for the test, so that nothing has to be timed.

``STAGED_SLOW``: a file; until it is there each training step takes a second. ``STAGED_PAUSE``: a
file; where it is not there yet, rank 1 makes it, with its process id, in the middle of the
expansion's exchange, and stays there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TARGET = "megatron_progressive.train.loop"


def _before(owner: Any, name: str, act: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _slowly() -> None:
    released = os.environ.get("STAGED_SLOW")
    if released and not Path(released).exists():
        time.sleep(1)


def _pause() -> None:
    marker = os.environ.get("STAGED_PAUSE")
    if marker and os.environ.get("SLURM_PROCID") == "1" and not Path(marker).exists():
        Path(marker + ".part").write_text(str(os.getpid()))
        Path(marker + ".part").rename(marker)
        time.sleep(3600)


class _AfterImport:
    """Changes the training loop once it has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def and_change(module: Any) -> None:
            execute(module)
            from megatron_progressive.reshard import transfer

            _before(module._Run, "train_step", _slowly)
            _before(transfer, "_exchange", _pause)

        spec.loader.exec_module = and_change  # type: ignore[method-assign]
        return spec


if "STAGED_SLOW" in os.environ or "STAGED_PAUSE" in os.environ:
    sys.meta_path.insert(0, _AfterImport())  # type: ignore[arg-type]
