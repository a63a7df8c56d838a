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
from typing import Any

import torch

from megatron_progressive.config import OptimSection
from megatron_progressive.optim.newton_schulz import compute_dtype, newton_schulz


def with_momentum(
    grads: list[torch.Tensor], momenta: list[torch.Tensor], optim: OptimSection
) -> list[torch.Tensor]:
    """The directions of updates, fp32 of the gradients' shapes; ``momenta`` are updated."""
    if not grads:
        return []
    grads = [grad.to(torch.float32) for grad in grads]
    torch._foreach_lerp_(momenta, grads, 1 - optim.momentum)
    if not optim.nesterov:
        return momenta
    return list(torch._foreach_lerp(grads, momenta, optim.momentum))


def matrices_of(tensor: torch.Tensor, row_blocks: tuple[int, ...]) -> list[torch.Tensor]:
    """The separate matrices of a whole tensor, as copies or views.

    An axis before the last two counts matrices. With ``row_blocks`` the rows interleave per head
    group (Q rows, K rows, V rows of group 0, then of group 1, ...); each block over all groups
    is one matrix.
    """
    return [matrix for part in _parts(tensor[None], row_blocks) for matrix in part]


def joined(matrices: list[torch.Tensor], row_blocks: tuple[int, ...]) -> torch.Tensor:
    """The inverse of :func:`matrices_of`; several matrices without blocks are stacked."""
    if not row_blocks:
        return matrices[0] if len(matrices) == 1 else torch.stack(matrices)
    return _rejoined([matrix[None] for matrix in matrices], row_blocks)[0]


def _parts(tensors: torch.Tensor, row_blocks: tuple[int, ...]) -> list[torch.Tensor]:
    """The matrices of tensors of one shape, [L, ...]: [M, O, I] of each block of rows."""
    if tensors.dim() > 3 or not row_blocks:
        return [tensors.flatten(0, -3)]
    count, _, columns = tensors.shape
    grouped = tensors.view(count, -1, sum(row_blocks), columns)
    parts = torch.split(grouped, list(row_blocks), dim=2)
    return [part.reshape(count, -1, columns) for part in parts]


def _rejoined(parts: list[torch.Tensor], row_blocks: tuple[int, ...]) -> torch.Tensor:
    """The inverse of :func:`_parts`, [L, O, I], of matrices in blocks of rows."""
    count, _, columns = parts[0].shape
    blocks = [p.view(count, -1, n, columns) for p, n in zip(parts, row_blocks, strict=True)]
    return torch.cat(blocks, dim=2).reshape(count, -1, columns)


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
    """Muon's scaled update of each whole tensor, whose matrices :func:`matrices_of` names.

    Small matrices are bound by launches: tensors of one shape are cut and joined together, and
    Newton-Schulz runs on one batch for each shape of matrices.
    """
    kinds: dict[tuple[torch.Size, tuple[int, ...]], list[int]] = defaultdict(list)
    for i, (tensor, blocks) in enumerate(zip(tensors, row_blocks, strict=True)):
        kinds[tensor.shape, blocks if tensor.dim() == 2 else ()].append(i)
    parts: dict[Any, list[torch.Tensor]] = {}  # of tensors in blocks, which are copied for it
    places: dict[torch.Size, list[tuple[Any, int]]] = defaultdict(list)
    for (shape, blocks), members in kinds.items():
        kind = shape, blocks
        if blocks:
            parts[kind] = _parts(torch.stack([tensors[i] for i in members]), blocks)
        else:
            parts[kind] = [tensors[i].reshape(-1, *shape[-2:]) for i in members]
        for number, part in enumerate(parts[kind]):
            places[part.shape[1:]].append((kind, number))
    for size, of_size in places.items():
        found = [parts[kind][number] for kind, number in of_size]
        counts = [len(part) for part in found]
        batch = newton_schulz(
            torch.cat(found),
            optim.ns_steps,
            coefficients=optim.ns_coefficients,
            dtype=compute_dtype(optim, tensors[0].device),
            kernel_from=optim.ns_kernel_from,
        )
        batch *= update_scale(size[0], size[1], optim.scale)
        for (kind, number), matrices in zip(of_size, torch.split(batch, counts), strict=True):
            parts[kind][number] = matrices
    updates: dict[int, torch.Tensor] = {}
    for kind, members in kinds.items():
        whole = _rejoined(parts[kind], kind[1]) if kind[1] else parts[kind]
        updates |= zip(members, (one.reshape(kind[0]) for one in whole), strict=True)
    return [updates[i] for i in range(len(tensors))]


def normalised(
    updates: list[torch.Tensor], norms: torch.Tensor, numels: list[int]
) -> list[torch.Tensor]:
    """NSGD's updates of tensors of which ``updates`` may be parts.

    Args:
        updates: the updates with momentum, fp32 and flat.
        norms: the norms of the whole tensors' updates, [tensors], all above zero.
        numels: the numbers of elements in the whole tensors.
    """
    found: dict[int, torch.Tensor] = {}
    kinds: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (update, numel) in enumerate(zip(updates, numels, strict=True)):
        kinds[len(update), numel].append(i)
    for (_, numel), members in kinds.items():
        norm = torch.stack([norms[i] for i in members])[:, None]
        # divided first: a zero tensor has a zero update, not 0 x infinity
        rows = torch.stack([updates[i] for i in members]).div_(norm).mul_(math.sqrt(numel))
        found |= zip(members, rows, strict=True)
    return [found[i] for i in range(len(updates))]


def squares_of(updates: list[torch.Tensor]) -> torch.Tensor:
    """The sum of squares of each flat tensor, fp32 [tensors]; those of one size at once."""
    found: dict[int, torch.Tensor] = {}
    sizes: dict[int, list[int]] = defaultdict(list)
    for i, update in enumerate(updates):
        sizes[len(update)].append(i)
    for members in sizes.values():
        rows = torch.stack([updates[i] for i in members])
        found |= zip(members, rows.square_().sum(1), strict=True)
    return torch.stack([found[i] for i in range(len(updates))])
