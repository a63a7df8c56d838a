"""The CUDA path of the engines against the CPU's: same functions, NCCL for gloo."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.on_device import device_of_rank, through_an_expansion
from tests.cuda.serve import PoolOnDevice
from tests.engines.on_ranks import Full, family_config
from tests.pool import Pool

FP32 = 1e-6
"""Largest relative difference of losses in fp32."""
TENSORS = {"muon_nsgd": 1e-5, "adamw": 1e-4}
"""Of tensors after some steps, in fp32; AdamW divides small gradients by small ones."""


def differences(here: Full, there: Full) -> dict[tuple[str, str], float]:
    """Of each tensor: the norm of the difference by the tensor's own."""
    assert here.keys() == there.keys()
    out = {}
    for key, a in here.items():
        b = there[key]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), key
        norm = float(torch.linalg.vector_norm(a.double()))
        out[key] = float(torch.linalg.vector_norm(a.double() - b.double())) / (norm + 1e-30)
    return out


def test_ranks_are_on_the_device(device_pool: PoolOnDevice) -> None:
    for backend, device in device_pool.run(2, device_of_rank):
        assert backend == "nccl"
        assert "stand-in" in device


LAYOUTS = {"tensor": {"tensor": 2}, "virtual": {"pipeline": 2, "virtual_pipeline": 2}}


@pytest.mark.parametrize(
    ("optimizer", "layout"), [("adamw", "tensor"), ("muon_nsgd", "tensor"), ("adamw", "virtual")]
)
def test_expansion_with_another_layout(
    pool: Pool, device_pool: PoolOnDevice, optimizer: str, layout: str
) -> None:
    """GPT-2, from DP 2, in fp32: losses and whole state before and after."""
    words = [f"optim.name={optimizer}", "optim.ns_dtype=fp32", "train.precision=fp32"]
    expansion = {"at": 10, "to_layers": 4, "init": "copying", "parallel": LAYOUTS[layout]}
    config = family_config("gpt2", ["model.num_layers=1", *words], expansion)
    there = pool.run(2, through_an_expansion, config)[0]
    here = device_pool.run(2, through_an_expansion, config)[0]
    assert here["losses"] == pytest.approx(there["losses"], rel=FP32)
    assert here["bytes_moved"] == there["bytes_moved"]
    for when in ("before", "after"):
        # Keys' bias moves no softmax: its gradient is rounding, of which AdamW takes the sign.
        worst = {
            key: value
            for key, value in differences(here[when], there[when]).items()
            if value > TENSORS[optimizer] and not ("qkv.bias" in key[0] and optimizer == "adamw")
        }
        assert not worst


def test_bf16(pool: Pool, device_pool: PoolOnDevice) -> None:
    """In bf16 the two differ by roundings of intermediate values."""
    expansion = {"at": 10, "to_layers": 4, "init": "copying", "parallel": {"tensor": 2}}
    words = ["model.num_layers=1", "train.precision=bf16"]
    config = family_config("gpt2", words, expansion)
    there = pool.run(2, through_an_expansion, config)[0]
    here = device_pool.run(2, through_an_expansion, config)[0]
    assert here["losses"] == pytest.approx(there["losses"], rel=2e-3)
