"""Muon-NSGD against torch's own Muon and AdamW, a plain formula and a page of plain code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megatron_progressive.config import OptimSection
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.optim.coefficients import SETS
from megatron_progressive.optim.flat import Cut, FlatOptimizer
from megatron_progressive.optim.muon import (
    joined,
    matrices_of,
    muon_updates,
    normalised,
    squares_of,
    update_scale,
    with_momentum,
)
from megatron_progressive.optim.newton_schulz import newton_schulz
from tests.optim import plain_muon
from tests.pool import Pool

OPTIM = OptimSection(lr=0.02, weight_decay=0.01)


def matrix(*shape: int, role: str = "proj", **more: object) -> TensorSpec:
    return TensorSpec(shape, role, "normal", **more)  # type: ignore[arg-type]


def vector(size: int, **more: object) -> TensorSpec:
    return TensorSpec((size,), "norm_gain", "ones", **more)  # type: ignore[arg-type]


TABLE = {
    "linear": matrix(24, 16, tp_axis=0),
    "tall": matrix(64, 16, tp_axis=1),
    "second of a size": matrix(24, 16),
    "queries, keys, values": matrix(24, 16, role="qkv", row_blocks=(8, 2, 2), tp_axis=0),
    "gate and up": matrix(2, 16, 12, role="fc1", tp_axis=1),
    "gain": vector(24, tp_axis=0),
    "bias": vector(16),
}


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def optimizer_of(
    weights: dict[str, torch.Tensor],
    table: dict[str, TensorSpec],
    optim: OptimSection = OPTIM,
    tensor_group: dist.ProcessGroup | None = None,
) -> FlatOptimizer:
    """The optimizer of one data-parallel rank, each tensor a partition of its own."""
    ranks = tensor_group.size() if tensor_group else 1
    optimizer = FlatOptimizer(list(weights.values()), optim, tensor_group=tensor_group)  # type: ignore[arg-type]
    for name, weight in weights.items():
        cut = Cut(name, table[name], {0: (0, weight.numel())}, tensor_ranks=ranks)
        optimizer.attach(weight, weight, [cut])
    return optimizer


def run(weight: torch.Tensor, spec: TensorSpec, optim: OptimSection = OPTIM) -> None:
    """Five steps of random gradients on one tensor."""
    optimizer = optimizer_of({"": weight}, {"": spec}, optim)
    for step in range(5):
        weight.grad = random(tuple(weight.shape), 100 * step)
        optimizer.step()


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_muon_equals_torchs(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch orthogonalises in bf16; with its cast to bf16 taken away both are fp32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)
    start = random(shape, 1)
    ours = start.clone()
    run(ours, matrix(*shape))
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
        theirs.grad = random(shape, 100 * step)
        optimizer.step()
    assert torch.allclose(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, start, atol=1e-3)


def test_embeddings_by_adamw_equal_torchs() -> None:
    start = random((20, 8), 1)
    ours = start.clone()
    optim = OptimSection(lr=0.02, weight_decay=0.01, embeddings="adamw")
    run(ours, matrix(20, 8, role="embedding"), optim)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW(
        [theirs], lr=0.02, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, weight_decay=0.01
    )
    for step in range(5):
        theirs.grad = random((20, 8), 100 * step)
        optimizer.step()
    assert torch.equal(ours, theirs.detach())


def test_nsgd_is_momentum_over_norm() -> None:
    ours, grad = torch.ones(12), torch.arange(12.0)
    optimizer = optimizer_of({"": ours}, {"": vector(12)})
    expected, momentum = torch.ones(12), torch.zeros(12)
    for _ in range(3):
        ours.grad = grad.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * grad
        update = 0.05 * grad + 0.95 * momentum
        expected -= 0.02 * update / update.norm() * math.sqrt(12)
    assert torch.allclose(ours, expected, rtol=1e-6)


def test_zero_gradients_leave_weights_finite() -> None:
    weights = {"matrix": torch.ones(4, 6), "vector": torch.ones(5)}
    optimizer = optimizer_of(weights, {"matrix": matrix(4, 6), "vector": vector(5)})
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.allclose(weights["matrix"], torch.full((4, 6), 1 - 0.02 * 0.01))
    assert torch.equal(weights["vector"], torch.ones(5))  # vectors have no weight decay


def test_newton_schulz_brings_singular_values_near_one() -> None:
    batch = random((3, 24, 40), 3)
    values = torch.linalg.svdvals(newton_schulz(batch))
    assert values.min() > 0.5
    assert values.max() < 1.3
    one = newton_schulz(batch[1])
    assert torch.allclose(newton_schulz(batch)[1], one, atol=1e-5)


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


def plain_steps() -> dict[str, torch.Tensor]:
    """Three steps of the plain code."""
    weights = {name: random(spec.shape, i) for i, (name, spec) in enumerate(TABLE.items())}
    momenta = {name: torch.zeros(spec.shape) for name, spec in TABLE.items()}
    for step in range(3):
        grads = gradients(step)
        plain_muon.step(weights, grads, momenta, TABLE, OPTIM)
    return weights


def gradients(step: int) -> dict[str, torch.Tensor]:
    shapes = {name: spec.shape for name, spec in TABLE.items()}
    return {name: random(shape, 100 * step + i) for i, (name, shape) in enumerate(shapes.items())}


def steps_on_ranks() -> dict[str, torch.Tensor]:
    """The same three steps with every tensor cut over all ranks; returns this rank's shards."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def shard(name: str, tensor: torch.Tensor) -> torch.Tensor:
        axis = TABLE[name].tp_axis
        return tensor.clone() if axis is None else tensor.chunk(world, axis)[rank].contiguous()

    shapes = {name: spec.shape for name, spec in TABLE.items()}
    weights = {name: shard(name, random(s, i)) for i, (name, s) in enumerate(shapes.items())}
    optimizer = optimizer_of(weights, TABLE, tensor_group=dist.group.WORLD)
    for step in range(3):
        for name, grad in gradients(step).items():
            weights[name].grad = shard(name, grad)
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_together_do_what_plain_code_does(pool: Pool, world: int) -> None:
    found = pool.run(world, steps_on_ranks)
    for name, expected in plain_steps().items():
        axis = TABLE[name].tp_axis
        shards = [one[name] for one in found]
        whole = shards[0] if axis is None else torch.cat(shards, axis)
        assert torch.allclose(whole, expected, atol=1e-5), name
        assert axis is not None or all(torch.equal(shards[0], other) for other in shards)


SHAPES = [((24, 8), ()), ((24, 8), ()), ((24, 8), (4, 2, 2)), ((8, 24), ()), ((6, 10, 3), ()),
          ((24, 8), (4, 2, 2)), ((8, 8), ()), ((16, 8), ()), ((1, 40), ())]  # fmt: skip


def test_tensors_of_one_shape_together_have_the_bits_of_each_alone() -> None:
    """Cut, orthogonalised, scaled and joined."""
    generator = torch.Generator().manual_seed(3)
    optim = OptimSection()
    tensors = [torch.randn(shape, generator=generator) for shape, _ in SHAPES]
    blocks = [rows for _, rows in SHAPES]
    together = muon_updates(tensors, blocks, optim)
    for tensor, rows, found in zip(tensors, blocks, together, strict=True):
        (alone,) = muon_updates([tensor], [rows], optim)
        parts = [
            newton_schulz(m[None])[0] * update_scale(m.shape[0], m.shape[1], optim.scale)
            for m in matrices_of(tensor, rows)
        ]
        assert found.shape == tensor.shape
        assert torch.equal(found, alone)
        assert torch.equal(found, joined(parts, rows))


@pytest.mark.parametrize("nesterov", [True, False])
def test_many_vectors_have_the_bits_of_each_alone(nesterov: bool) -> None:
    """Momentum, squares and division, of vectors of several sizes, some cut, some not there."""
    generator = torch.Generator().manual_seed(4)
    optim = OptimSection(nesterov=nesterov)
    sizes = [768, 5, 0, 768, 3072, 1, 768, 0, 20_000, 5]
    numels = [max(1, size) * (1 + i % 2) for i, size in enumerate(sizes)]
    grads = [torch.randn(size, generator=generator) for size in sizes]
    momenta = [torch.randn(size, generator=generator) for size in sizes]
    plain_momenta = [momentum.clone() for momentum in momenta]
    updates = with_momentum(grads, momenta, optim)
    squares = squares_of(updates)
    norms = squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    found = normalised(updates, norms, numels)
    for i, (grad, momentum) in enumerate(zip(grads, plain_momenta, strict=True)):
        momentum.lerp_(grad, 1 - optim.momentum)
        update = grad.lerp(momentum, optim.momentum) if nesterov else momentum
        assert torch.equal(momenta[i], momentum)
        assert torch.equal(squares[i], update.square().sum())
        assert torch.equal(found[i], update.div(norms[i]).mul(math.sqrt(numels[i])))
