"""What the tests on a GPU share: one rank over NCCL, and the same runs on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.runs import EVERY_RUN

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def rank() -> Iterator[None]:
    """A world of this process alone, over NCCL."""
    from megatron_progressive.runtime.distributed import Place, world_group

    with world_group(Place(0, 0, 1)):
        yield


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the runs of :mod:`tests.gpu.runs` give without a GPU, by name: in a process to which
    the device is hidden."""
    file = tmp_path_factory.mktemp("on_cpu") / "runs.json"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "tests.gpu.runs", str(file), *EVERY_RUN]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    found: dict[str, Any] = json.loads(file.read_text())
    return found
