"""Muon-NSGD on whole tensors, a page of plain code: the oracle of what ranks do together."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from megatron_progressive.config import OptimSection
from megatron_progressive.models.base import TensorSpec


def polar_factor(matrix: torch.Tensor) -> torch.Tensor:
    """Five quintic Newton-Schulz steps with Jordan's coefficients, of one [O, I] matrix."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def matrix_update(update: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Every matrix of a tensor on its own, one after the other."""
    out = torch.empty_like(update)
    if len(spec.shape) == 2 and spec.row_blocks:
        rows, start = torch.arange(spec.shape[0]).view(-1, sum(spec.row_blocks)), 0
        for block in spec.row_blocks:
            own = rows[:, start : start + block].reshape(-1)
            out[own] = polar_factor(update[own]) * math.sqrt(len(own) / spec.shape[1])
            start += block
        return out
    n_out, n_in = spec.shape[-2:]
    for whole, part in zip(out.view(-1, n_out, n_in), update.view(-1, n_out, n_in), strict=True):
        whole.copy_(polar_factor(part) * math.sqrt(n_out / n_in))
    return out


def step(
    weights: Mapping[str, torch.Tensor],
    grads: Mapping[str, torch.Tensor],
    momenta: Mapping[str, torch.Tensor],
    table: Mapping[str, TensorSpec],
    optim: OptimSection,
) -> None:
    """One step in place, Nesterov's momentum, Muon on all matrices and NSGD on all vectors."""
    for name, spec in table.items():
        momentum, grad = momenta[name], grads[name]
        momentum.copy_(optim.momentum * momentum + (1 - optim.momentum) * grad)
        update = optim.momentum * momentum + (1 - optim.momentum) * grad
        if len(spec.shape) > 1:
            update = matrix_update(update, spec)
            weights[name].mul_(1 - optim.lr * optim.weight_decay)
        else:
            update = update / update.norm().clamp_min(1e-30) * math.sqrt(update.numel())
        weights[name].sub_(optim.lr * update)
