"""The same runs on a GPU. Skipped, and says so, where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_progressive.runs.folder import read_metrics
from tests.train.small_runs import run_values

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def train(folder: Path, corpus: Path, name: str, hide_gpu: bool, **changes: object) -> Path:
    """One rank in a process of its own; returns the run folder."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(run_values(folder, corpus, name, **changes)))
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})}
    command = [sys.executable, "-m", "megatron_progressive", "train", str(file)]
    subprocess.run(command, env=environment, check=True, timeout=300)
    return folder / name


def losses(folder: Path) -> list[float]:
    return [e["loss"] for e in read_metrics(folder) if e["event"] == "train"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon_nsgd"])
def test_fp32_run_agrees_with_the_cpu(corpus: Path, tmp_path: Path, optimizer: str) -> None:
    optim = {"name": optimizer, "ns_dtype": "fp32"}  # on CUDA it is fp16 by default
    here = train(tmp_path, corpus, "cuda", False, optim=optim)
    there = train(tmp_path, corpus, "cpu", True, optim=optim)
    assert losses(here) == pytest.approx(losses(there), rel=5e-3)  # TF32 is off by default


def test_bf16_run_learns_through_an_expansion(corpus: Path, tmp_path: Path) -> None:
    base = run_values(tmp_path, corpus, "bf16")["train"]
    folder = train(tmp_path, corpus, "bf16", False, train={**base, "precision": "bf16"})
    curve = losses(folder)
    assert len(curve) == 60
    assert curve[-1] < 0.95 * curve[0]
