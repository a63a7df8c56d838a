"""The same runs on a GPU as on the CPU, through an expansion. Skipped, and says so, where there is
no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_progressive.models import TRANSFORMERS
from megatron_progressive.runs.folder import read_metrics
from tests.gpu import runs
from tests.train.small_runs import run_values

FP32_TOLERANCE = 2e-4
"""Relative, of losses and gradient norms: other orders of summation, over eight steps."""
BF16_TOLERANCE = 2e-2

needs_transformer_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine"
)


def test_fp32_products_are_fp32(rank: None) -> None:
    """TF32, which rounds inputs to ten bits, is off, for products and convolutions."""
    assert not torch.backends.cuda.matmul.allow_tf32
    a, b = (torch.randn(256, 256, device="cuda") for _ in range(2))
    exact = a.double() @ b.double()
    assert float(((a @ b).double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("name", list(runs.EVERY_RUN))
def test_fp32_run_agrees_with_the_cpu(rank: None, on_cpu: dict[str, Any], name: str) -> None:
    here, there = runs.named(name), on_cpu[name]
    assert here.losses == pytest.approx(there["losses"], rel=FP32_TOLERANCE)
    assert here.norms == pytest.approx(there["norms"], rel=FP32_TOLERANCE)
    assert here.across == pytest.approx(there["across"], rel=FP32_TOLERANCE)


@needs_transformer_engine
@pytest.mark.parametrize("family", list(TRANSFORMERS))
@pytest.mark.parametrize("optimizer", ["muon_nsgd", "adamw"])
def test_transformer_engine_agrees_with_local_layers(
    rank: None, family: str, optimizer: str
) -> None:
    words = ["train.precision=bf16", f"optim.name={optimizer}"]
    fast = runs.run(family, *words)
    local = runs.run(family, *words, "kernels.transformer_engine=false")
    assert fast.losses == pytest.approx(local.losses, rel=BF16_TOLERANCE)
    assert fast.across == pytest.approx(local.across, rel=BF16_TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "deepseek_v3"])
def test_state_after_an_expansion_is_the_plain_one(rank: None, family: str, precision: str) -> None:
    """Bit for bit, with another ZeRO stage behind it than before it."""
    words = [f"train.precision={precision}", "parallel.zero_stage=0"]
    after, expected = runs.expanded_state(family, *words)
    assert after.keys() == expected.keys()
    assert [key for key in after if not torch.equal(after[key], expected[key])] == []


def train(folder: Path, corpus: Path, name: str, *words: str, **changes: object) -> Path:
    """``mprog train`` in a process of its own; returns the run folder."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(run_values(folder, corpus, name, **changes)))
    command = [sys.executable, "-m", "megatron_progressive", "train", str(file), *words]
    subprocess.run(command, env=dict(os.environ), check=True, timeout=300)
    return folder / name


def losses(folder: Path) -> list[float]:
    return [e["loss"] for e in read_metrics(folder) if e["event"] == "train"]


def test_bf16_run_learns_through_an_expansion_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    base = run_values(tmp_path, corpus, "bf16")["train"]
    train(tmp_path, corpus, "bf16", "train.stop_after=50", train={**base, "precision": "bf16"})
    folder = train(tmp_path, corpus, "bf16", train={**base, "precision": "bf16"})
    curve = losses(folder)
    assert len(curve) == 60
    assert curve[-1] < 0.95 * curve[0]
    whole = train(tmp_path, corpus, "whole", train={**base, "precision": "bf16"})
    assert curve == pytest.approx(losses(whole), rel=BF16_TOLERANCE)
