"""Fixtures of the tests that run the CUDA path on the stand-in device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cuda.serve import ROOT, PoolOnDevice, variables
from tests.pool import Pool

Run = Callable[..., subprocess.CompletedProcess[str]]


def _pool(mode: str) -> Iterator[PoolOnDevice]:
    pool = PoolOnDevice(4, variables(mode))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Ranks over gloo alone: these tests compare with them."""
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def device_pool() -> Iterator[PoolOnDevice]:
    """Ranks on the device, whose arithmetic the host does."""
    yield from _pool("computing")


@pytest.fixture(scope="session")
def checking_pool() -> Iterator[PoolOnDevice]:
    """As ``device_pool``, and refuses what a GPU would not forgive."""
    yield from _pool("checking")


@pytest.fixture(scope="session")
def transformer_engine() -> str:
    """The folder of its unpacked wheels."""
    folder = os.environ.get("MPROG_TRANSFORMER_ENGINE", "")
    if not folder or not (Path(folder) / "transformer_engine").is_dir():
        pytest.skip("no Transformer Engine: MPROG_TRANSFORMER_ENGINE names no folder with it")
    return folder


@pytest.fixture
def on_device() -> Run:
    """``on_device(mode, *arguments)``: Python with these arguments on the device."""

    def run(mode: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = {**variables(mode), **changes}
        environment["PYTHONPATH"] = f"{environment['PYTHONPATH']}:{ROOT}"
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment, cwd=Path(ROOT), capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return run
