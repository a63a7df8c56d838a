"""The environment variables with which a process runs on the stand-in."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_progressive.standin.build import DRIVER, PRELOADED, build

MODES = ("counting", "computing", "checking")
INSIDE = Path(__file__).with_name("inside")
"""First on a process's path: its ``sitecustomize`` prepares torch."""


_MEETINGS = Path("/dev/shm")
_STALE_S = 24 * 3600
"""Ranks that are killed leave their folder."""


def _sweep() -> None:
    """Removes the folders of jobs that were killed long ago."""
    for folder in _MEETINGS.glob("standin_*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # another process was quicker
            continue


def forget(variables: Mapping[str, str]) -> None:
    """Removes what the ranks of a job have left in the place where they met: nothing, unless some
    were killed.

    Args:
        variables: what :func:`environment` gave for the job, which has ended.
    """
    shutil.rmtree(_MEETINGS / f"standin_{variables['STANDIN_JOB']}", ignore_errors=True)


def environment(
    mode: str,
    devices: int = 8,
    gib: float = 79,
    *,
    alone: bool = False,
    report: str | os.PathLike[str] | None = None,
    timeout_s: int = 120,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """What a process, and those that it starts, need to run on the stand-in. Builds it first.

    Ranks of one job must be given the same dictionary, or inherit it: it names the place where
    they meet.

    Args:
        mode: one of :data:`MODES`.
        devices: how many the process sees.
        gib: memory of each device (79 GiB is what an H100 of 80 GB leaves).
        alone: NCCL answers as if all other ranks had come; of theirs nothing arrives.
        report: counts are written to ``<report>.<pid>.json`` when a process ends.
        timeout_s: how long a rank waits for others before it fails.
        base: what to add to; None: this process's environment.

    Raises:
        ValueError: an unknown mode.
        RuntimeError: the stand-in is not available, or cannot be built.
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode}; accepted: {', '.join(MODES)}")
    folder = build()
    _sweep()
    out = dict(os.environ if base is None else base)
    for name, first in (
        ("LD_PRELOAD", str(folder / PRELOADED)),
        ("LD_LIBRARY_PATH", str(folder)),
        ("PYTHONPATH", str(INSIDE)),
    ):
        rest = [part for part in out.get(name, "").split(":") if part and part != first]
        out[name] = ":".join([first, *rest])
    out.pop("CUDA_VISIBLE_DEVICES", None)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        out.pop(name, None)  # expandable segments are made by driver calls that do nothing here
    out |= {
        "STANDIN_MODE": mode,
        "STANDIN_JOB": secrets.token_hex(6),
        "STANDIN_DEVICES": str(devices),
        "STANDIN_MIB": str(int(gib * 1024)),
        "STANDIN_ALONE": str(int(alone)),
        "STANDIN_TIMEOUT_S": str(timeout_s),
        "STANDIN_REPORT": str(Path(report).absolute()) if report is not None else "",
        "STANDIN_COPY_MIB": "1" if mode == "counting" else "",
        "STANDIN_PACKAGE": str(Path(__file__).resolve().parents[2]),
        # libcuda is opened by that name; Triton looks for it with ldconfig otherwise
        "TRITON_LIBCUDA_PATH": str((folder / DRIVER).parent),
        # there is no place to run what a compiler makes
        "TORCHDYNAMO_DISABLE": "1",
    }
    if mode == "checking":
        # each tensor is a block of the device, so that its end is seen
        out["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return out
