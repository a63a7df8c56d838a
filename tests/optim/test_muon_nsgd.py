"""Muon-NSGD against torch's own Muon and AdamW, and against a plain formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_progressive.config import OptimSection
from megatron_progressive.optim.coefficients import SETS
from megatron_progressive.optim.muon_nsgd import MuonNSGD, joined, matrices_of, update_scale
from megatron_progressive.optim.newton_schulz import orthogonalise
from tests.pool import Pool

OPTIM = OptimSection(lr=0.02, weight_decay=0.01)


def group(param: torch.Tensor, rule: str, **more: Any) -> dict[str, Any]:
    return dict(params=[param], rule=rule, weight_decay=0.01, **more)


def run(params: list[torch.Tensor], groups: list[dict[str, Any]], steps: int = 5) -> None:
    optimizer = MuonNSGD(groups, OPTIM)
    optimizer.init_state()
    for step in range(steps):
        for i, param in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + i)
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_muon_equals_torchs(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch orthogonalises in bf16; with its cast to bf16 taken away both are fp32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours = start.clone()
    run([ours], [group(ours, "muon")])
    theirs = torch.nn.Parameter(start.clone())
    # torch scales by sqrt(max(1, out / in)) in "original"; ours by sqrt(out / in)
    ratio = math.sqrt(shape[0] / shape[1]) / math.sqrt(max(1, shape[0] / shape[1]))
    optimizer = torch.optim.Muon(
        [theirs],
        lr=0.02 * ratio,
        weight_decay=0.01 / ratio,
        momentum=0.95,
        nesterov=True,
        ns_coefficients=SETS["jordan"].values[0],
        ns_steps=5,
        adjust_lr_fn="original",
    )
    for step in range(5):
        theirs.grad = torch.randn(shape, generator=torch.Generator().manual_seed(100 * step))
        optimizer.step()
    assert torch.allclose(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, start, atol=1e-3)


def test_embeddings_by_adamw_equal_torchs() -> None:
    start = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    ours = start.clone()
    run([ours], [group(ours, "adamw")])
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW(
        [theirs], lr=0.02, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, weight_decay=0.01
    )
    for step in range(5):
        theirs.grad = torch.randn(20, 8, generator=torch.Generator().manual_seed(100 * step))
        optimizer.step()
    assert torch.equal(ours, theirs.detach())


def test_nsgd_is_momentum_over_norm() -> None:
    ours = torch.ones(12)
    grad = torch.arange(12.0)
    optimizer = MuonNSGD([dict(params=[ours], rule="nsgd", weight_decay=0.0)], OPTIM)
    optimizer.init_state()
    expected, momentum = torch.ones(12), torch.zeros(12)
    for _ in range(3):
        ours.grad = grad.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * grad
        update = 0.05 * grad + 0.95 * momentum
        expected -= 0.02 * update / update.norm() * math.sqrt(12)
    assert torch.allclose(ours, expected, rtol=1e-6)


def test_zero_gradients_leave_weights_finite() -> None:
    matrix, vector = torch.ones(4, 6), torch.ones(5)
    optimizer = MuonNSGD([group(matrix, "muon"), group(vector, "nsgd")], OPTIM)
    optimizer.init_state()
    matrix.grad, vector.grad = torch.zeros(4, 6), torch.zeros(5)
    optimizer.step()
    decayed = 1 - 0.02 * 0.01
    assert torch.allclose(matrix, torch.full((4, 6), decayed))
    assert torch.allclose(vector, torch.full((5,), decayed))


def test_orthogonalise_brings_singular_values_near_one() -> None:
    batch = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(orthogonalise(batch))
    assert values.min() > 0.5
    assert values.max() < 1.3
    one = orthogonalise(batch[1])
    assert torch.allclose(orthogonalise(batch)[1], one, atol=1e-5)


def test_qkv_rows_separate_and_join() -> None:
    heads, head, width = 3, 2, 5
    q, k, v = (torch.full((heads * head, width), float(i)) for i in range(3))
    interleaved = torch.cat(
        [torch.cat([m.view(heads, head, width)[g] for m in (q, k, v)]) for g in range(heads)]
    )
    parts = matrices_of(interleaved, (head, head, head))
    assert all(torch.equal(a, b) for a, b in zip(parts, (q, k, v), strict=True))
    assert torch.equal(joined(parts, (head, head, head)), interleaved)


def test_scales() -> None:
    assert update_scale(64, 16, "out_in") == 2.0
    assert update_scale(64, 16, "moonlight") == pytest.approx(1.6)


def tensor_parallel_step() -> list[torch.Tensor]:
    """Two sharded matrices, a sharded and a replicated vector, cut over all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    full = tensors()
    axes: list[int | None] = [0, 1, 0, None]
    params, groups = [], []
    for tensor, axis in zip(full, axes, strict=True):
        own = tensor if axis is None else tensor.chunk(world, axis)[rank].contiguous()
        rule = "muon" if tensor.dim() == 2 else "nsgd"
        params.append(own.clone())
        groups.append(group(params[-1], rule, tp_axis=axis))
    optimizer = MuonNSGD(groups, OPTIM, dist.group.WORLD)
    optimizer.init_state()
    for step in range(3):
        for i, (param, axis) in enumerate(zip(params, axes, strict=True)):
            generator = torch.Generator().manual_seed(100 * step + i)
            grad = torch.randn(full[i].shape, generator=generator)
            param.grad = grad if axis is None else grad.chunk(world, axis)[rank].contiguous()
        optimizer.step()
    return params


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(s, generator=generator) for s in ((24, 16), (16, 32), (24,), (16,))]


def test_tensor_parallel_update_equals_the_whole_one(pool: Pool) -> None:
    shards = pool.run(2, tensor_parallel_step)
    whole = tensors()
    run(whole, [group(t, "muon" if t.dim() == 2 else "nsgd") for t in whole], steps=3)
    for i, axis in enumerate((0, 1, 0)):
        assert torch.allclose(torch.cat([s[i] for s in shards], axis), whole[i], atol=1e-5)
    assert torch.allclose(shards[0][3], whole[3], atol=1e-6)
    assert torch.equal(shards[0][3], shards[1][3])
