"""Newton-Schulz of every coefficient set and type against singular value decompositions, and the
symmetric kernel through Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_progressive.config import OptimSection
from megatron_progressive.optim.coefficients import SETS, ns_coefficients, ns_steps
from megatron_progressive.optim.newton_schulz import DTYPES, compute_dtype, newton_schulz
from tests.optim.interpreted_kernel import CASES

ROOT = Path(__file__).resolve().parents[2]

SHAPES = [(24, 24), (16, 96), (96, 16), (40, 56)]
# Where singular values of at least 0.03 of the Frobenius norm end, in exact arithmetic: the range
# of the composed polynomial, which test_bounds_are_those_of_the_polynomials checks.
BOUNDS = {"jordan": (0.67, 1.15), "polar_express": (0.86, 1.14), "deepseek_v4": (0.999, 1.001)}
# How much further they may end by rounding.
SLACK = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.12}


def matrices(shape: tuple[int, int], batch: int = 3, condition: float = 4.0) -> torch.Tensor:
    """[batch, *shape] of singular values between 1 and 1 / condition, at any scale."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    u, _, v = torch.linalg.svd(torch.randn(batch, *shape, generator=generator), full_matrices=False)
    values = torch.logspace(0, -math.log10(condition), min(shape))
    scales = torch.tensor([1.0, 1e-3, 1e4])[:batch, None, None]
    return scales * (u * values) @ v


@pytest.mark.parametrize("name", SETS)
def test_bounds_are_those_of_the_polynomials(name: str) -> None:
    values = torch.linspace(0.03, 1.0, 20_000, dtype=torch.float64)
    for a, b, c in ns_coefficients(name):
        values = a * values + b * values**3 + c * values**5
    low, high = BOUNDS[name]
    assert low < values.min() < low + 0.05
    assert high - 0.05 < values.max() < high


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_and_directions(name: str, dtype: str, shape: tuple[int, int]) -> None:
    given = matrices(shape)
    result = newton_schulz(given, coefficients=name, dtype=DTYPES[dtype])
    assert result.dtype == torch.float32
    values, (low, high) = torch.linalg.svdvals(result), BOUNDS[name]
    assert values.min() > low - SLACK[dtype]
    assert values.max() < high + SLACK[dtype]
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    core = u.mT @ result @ v.mT  # diagonal where the singular vectors are kept
    off = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < (3e-4 if dtype == "fp32" else 0.2 if dtype == "bf16" else 0.03)
    one = newton_schulz(given[1], coefficients=name, dtype=DTYPES[dtype])
    assert torch.allclose(one, result[1], atol=1e-5 if dtype == "fp32" else 0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("shape", [(20, 20), (12, 40), (40, 12)])
def test_rank_deficient_and_zero_matrices(name: str, dtype: str, shape: tuple[int, int]) -> None:
    """What is in the row and column space is orthogonalised, nothing appears outside of it."""
    given = torch.zeros(2, *shape)
    given[0, :8, :8] = matrices((8, 8), 1)[0]
    result = newton_schulz(given, coefficients=name, dtype=DTYPES[dtype])
    assert torch.equal(result[1], torch.zeros(shape))
    outside = result[0].clone()
    outside[:8, :8] = 0
    assert not outside.any()
    values = torch.linalg.svdvals(result[0, :8, :8])
    assert values.min() > BOUNDS[name][0] - SLACK[dtype]


def test_fp16_is_closer_than_bf16() -> None:
    """Why it is the default on CUDA: also on a wide spectrum nothing overflows or is lost."""
    given = matrices((48, 64), condition=300.0)
    exact = newton_schulz(given.double(), coefficients="polar_express", dtype=torch.float64)
    errors = {
        dtype: float(
            (newton_schulz(given, coefficients="polar_express", dtype=dtype) - exact).norm()
            / exact.norm()
        )
        for dtype in (torch.float16, torch.bfloat16)
    }
    assert errors[torch.float16] < 0.25 * errors[torch.bfloat16]


def test_types_and_steps_of_a_run() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert compute_dtype(OptimSection(), cpu) == torch.float32
    assert compute_dtype(OptimSection(), cuda) == torch.float16
    assert compute_dtype(OptimSection(ns_dtype="bf16"), cpu) == torch.bfloat16
    assert ns_steps(OptimSection()) == 5
    assert ns_steps(OptimSection(ns_coefficients="deepseek_v4")) == 10
    assert ns_steps(OptimSection(ns_coefficients="deepseek_v4", ns_steps=3)) == 3
    assert len(ns_coefficients("polar_express", 12)) == 12
    assert ns_coefficients("polar_express", 12)[-1] == (1.875, -1.25, 0.375)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("emerging_optimizers", "absl", "triton")),
    reason="emerging-optimizers (with absl-py and triton) is not installed",
)
def test_sets_are_those_of_emerging_optimizers() -> None:
    from emerging_optimizers.orthogonalized_optimizers import muon_utils

    names = {"jordan": "simple", "polar_express": "polar_express", "deepseek_v4": "deepseekv4"}
    for ours, theirs in names.items():
        expected = muon_utils._COEFFICIENT_SETS[theirs]
        for step, known in zip(ns_coefficients(ours, len(expected)), expected, strict=True):
            assert step == pytest.approx(known, abs=1.1e-4)
        given = matrices((24, 40), 1)[0]
        steps = SETS[ours].steps
        result = muon_utils.newton_schulz(given, steps, theirs)
        assert torch.allclose(newton_schulz(given, coefficients=ours), result, atol=2e-3)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
def test_symmetric_kernel() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.optim.interpreted_kernel"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    tolerances = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}
    for case, found in zip(CASES, json.loads(done.stdout), strict=True):
        for error, symmetric in (found[:2], found[2:]):
            assert error < tolerances[case[0]], case
            assert symmetric, case


def test_symmetric_kernel_refuses_other_shapes() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from megatron_progressive.optim.symmetric import symmetric_product

    with pytest.raises(ValueError, match=r"\[batch, rows, columns\]"):
        symmetric_product(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"\(1, 3, 3\)"):
        symmetric_product(torch.ones(1, 3, 2), added=torch.ones(1, 2, 2))
