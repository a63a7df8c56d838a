"""Muon-NSGD from gradient to weight: Muon on matrices, normalised SGD on vectors, one rate.

Muon: K. Jordan et al. 2024; the pairing with normalised SGD: Bu et al. 2026, arXiv 2602.07145,
section 5.1. Shapes below: ``O`` outputs and ``I`` inputs of a linear layer, ``M`` matrices of one
shape, ``N`` elements of any tensor.

========================  =====================================================================
step                      where
========================  =====================================================================
1. which rule             :func:`.rules.rule_of`: ``muon``, ``nsgd`` or ``adamw``, by the role
2. momentum, N            :func:`with_momentum`, on the part of the tensor that this rank holds
3. who owns a matrix      :mod:`.owners`; what is not whole where it is owned is sent there first
                          (:mod:`.exchange`)
4. what is one matrix     :func:`matrices_of`: a weight is one [O, I]; queries, keys and values
                          that share a tensor, and kernels of a convolution, are several
5. orthogonalise          :func:`.newton_schulz.newton_schulz`, on batches [M, O, I]
6. scale                  :func:`update_scale`: sqrt(O / I), the spectral condition
   or normalise           :func:`normalised`: a vector over its norm, times sqrt(N)
7. apply                  W <- (1 - lr decay) W - lr factor U, with muP's ``factor`` of the tensor
                          (:mod:`.lr_factor`), in :class:`.flat.FlatOptimizer`
========================  =====================================================================

The functions here know no process group: :class:`.flat.FlatOptimizer` is steps 2 to 7 on the parts
of tensors that a rank holds. The paper gives no formula for the NSGD half. Ours: momentum first,
then the tensor is divided by its own norm and multiplied by sqrt(N), so that the update's root
mean square is the learning rate, as Muon's is for a square matrix up to sqrt(1 / O).
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from megatron_progressive.config import OptimSection
from megatron_progressive.optim.newton_schulz import compute_dtype, newton_schulz


def with_momentum(grad: torch.Tensor, momentum: torch.Tensor, optim: OptimSection) -> torch.Tensor:
    """The direction of an update, fp32 and of the gradient's shape; ``momentum`` is updated."""
    grad = grad.to(torch.float32)
    momentum.lerp_(grad, 1 - optim.momentum)
    return grad.lerp(momentum, optim.momentum) if optim.nesterov else momentum


def matrices_of(tensor: torch.Tensor, row_blocks: tuple[int, ...]) -> list[torch.Tensor]:
    """The separate matrices of a whole tensor, as copies or views.

    An axis before the last two counts matrices. With ``row_blocks`` the rows interleave per head
    group (Q rows, K rows, V rows of group 0, then of group 1, ...); each block over all groups
    is one matrix.
    """
    if tensor.dim() > 2:
        return list(tensor.flatten(0, -3))
    if not row_blocks:
        return [tensor]
    grouped = tensor.view(-1, sum(row_blocks), tensor.size(1))
    return [
        part.reshape(-1, tensor.size(1)) for part in torch.split(grouped, list(row_blocks), dim=1)
    ]


def joined(matrices: list[torch.Tensor], row_blocks: tuple[int, ...]) -> torch.Tensor:
    """The tensor of these matrices, as the inverse of :func:`matrices_of`; without blocks, several
    matrices are stacked."""
    if not row_blocks:
        return matrices[0] if len(matrices) == 1 else torch.stack(matrices)
    parts = [m.view(-1, n, m.size(1)) for m, n in zip(matrices, row_blocks, strict=True)]
    return torch.cat(parts, dim=1).reshape(-1, matrices[0].size(1))


def update_scale(n_out: int, n_in: int, scale: str) -> float:
    """The factor of an orthogonalised n_out x n_in update.

    ``out_in``: sqrt(n_out / n_in), the spectral condition (arXiv 2310.17813). ``moonlight``: 0.2
    sqrt(max(n_out, n_in)), matched to AdamW's RMS (arXiv 2502.16982).
    """
    if scale == "out_in":
        return math.sqrt(n_out / n_in)
    return 0.2 * math.sqrt(max(n_out, n_in))


def muon_updates(
    tensors: list[torch.Tensor], row_blocks: list[tuple[int, ...]], optim: OptimSection
) -> list[torch.Tensor]:
    """Muon's scaled update of each whole tensor; :func:`matrices_of` gives the matrices of a
    tensor.

    Newton-Schulz runs on one batch for each shape, since for small matrices the launches of kernels
    take the time.
    """
    by_shape: dict[torch.Size, list[tuple[int, int]]] = defaultdict(list)
    parts = [matrices_of(t, blocks) for t, blocks in zip(tensors, row_blocks, strict=True)]
    for i, matrices in enumerate(parts):
        for j, matrix in enumerate(matrices):
            by_shape[matrix.shape].append((i, j))
    for shape, places in by_shape.items():
        batch = newton_schulz(
            torch.stack([parts[i][j] for i, j in places]),
            optim.ns_steps,
            coefficients=optim.ns_coefficients,
            dtype=compute_dtype(optim, tensors[0].device),
            kernel_from=optim.ns_kernel_from,
        )
        batch *= update_scale(shape[0], shape[1], optim.scale)
        for (i, j), matrix in zip(places, batch, strict=True):
            parts[i][j] = matrix
    return [joined(matrices, blocks) for matrices, blocks in zip(parts, row_blocks, strict=True)]


def normalised(update: torch.Tensor, norm: torch.Tensor, numel: int) -> torch.Tensor:
    """NSGD's update of a tensor; ``update`` may be a part of it.

    Args:
        update: the update with momentum, fp32 of any shape.
        norm: the norm of the whole tensor's update, a number above zero.
        numel: the number of elements of the whole tensor.
    """
    # divided first: a zero tensor has a zero update, not 0 x infinity
    return update.div(norm).mul_(math.sqrt(numel))
