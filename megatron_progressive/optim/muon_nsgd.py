"""Muon-NSGD: Muon on matrices, normalised SGD on vectors, one learning rate.

Muon: K. Jordan et al. 2024; the pairing with normalised SGD: Bu et al. 2026, arXiv
2602.07145, section 5.1. The paper gives no formula for the NSGD half. Ours: momentum first,
then the tensor is divided by its own norm and multiplied by sqrt(numel), so that the update's
root mean square is the learning rate, as Muon's is for a square matrix up to sqrt(1/n).

:class:`MuonNSGD` is the plain form, on whole parameters: state is on every data-parallel rank.
Under tensor parallelism the shards of a matrix are gathered, every rank orthogonalises the whole
matrix and keeps its own shard. :mod:`.flat` is the divided form, with one rank for each matrix.
Both updates equal the unsharded one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from megatron_progressive.config import OptimSection
from megatron_progressive.optim.newton_schulz import compute_dtype, orthogonalise
from megatron_progressive.optim.rules import ADAMW, MUON, NSGD, STATE_SLOTS, STEP, rule_of
from megatron_progressive.runtime.memory import zeros_like

__all__ = [
    "ADAMW", "MUON", "NSGD", "MuonNSGD", "joined", "matrices_of", "rule_of", "update_scale",
]  # fmt: skip


def update_scale(n_out: int, n_in: int, scale: str) -> float:
    """Factor of an orthogonalised n_out x n_in update.

    ``out_in``: sqrt(n_out / n_in), the spectral condition (arXiv 2310.17813).
    ``moonlight``: 0.2 sqrt(max(n_out, n_in)), matched to AdamW's RMS (arXiv 2502.16982).
    """
    if scale == "out_in":
        return math.sqrt(n_out / n_in)
    return 0.2 * math.sqrt(max(n_out, n_in))


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
    """The inverse of :func:`matrices_of`; several matrices without blocks are stacked."""
    if not row_blocks:
        return matrices[0] if len(matrices) == 1 else torch.stack(matrices)
    parts = [m.view(-1, n, m.size(1)) for m, n in zip(matrices, row_blocks, strict=True)]
    return torch.cat(parts, dim=1).reshape(-1, matrices[0].size(1))


def with_momentum(grad: torch.Tensor, momentum: torch.Tensor, optim: OptimSection) -> torch.Tensor:
    """The direction of an update, fp32 of the gradient's shape; ``momentum`` is updated."""
    grad = grad.to(torch.float32)
    momentum.lerp_(grad, 1 - optim.momentum)
    return grad.lerp(momentum, optim.momentum) if optim.nesterov else momentum


def orthogonalised(
    tensors: list[torch.Tensor], row_blocks: list[tuple[int, ...]], optim: OptimSection
) -> list[torch.Tensor]:
    """Muon's scaled update of each whole tensor (:func:`matrices_of` names its matrices).

    Newton-Schulz runs on one batch a shape: small matrices are bound by launches.
    """
    by_shape: dict[torch.Size, list[tuple[int, int]]] = defaultdict(list)
    parts = [matrices_of(t, blocks) for t, blocks in zip(tensors, row_blocks, strict=True)]
    for i, matrices in enumerate(parts):
        for j, matrix in enumerate(matrices):
            by_shape[matrix.shape].append((i, j))
    for shape, places in by_shape.items():
        batch = orthogonalise(
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


class MuonNSGD(torch.optim.Optimizer):
    """One optimizer for all tensors; see the module's docstring.

    Each parameter group names its ``rule`` and, for tensors that tensor parallelism cuts,
    ``tp_axis``; ``row_blocks`` and ``stack`` name matrices that share a tensor.

    Args:
        params: parameter groups with ``params``, ``rule``, ``weight_decay``, ``tp_axis``,
            ``row_blocks`` and ``stack`` (matrices along a first axis that the parameter itself
            has in its rows; ``tp_axis`` counts that axis where it is above 1).
        optim: hyperparameters; ``lr`` is the initial one, later set on the groups.
        tensor_group: the tensor-parallel group; None without tensor parallelism.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        optim: OptimSection,
        tensor_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(params, dict(lr=optim.lr, tp_axis=None, row_blocks=(), stack=1))
        self.optim = optim
        self.tensor_group = tensor_group if tensor_group and tensor_group.size() > 1 else None

    @torch.no_grad()
    def init_state(self) -> None:
        """Allocate every slot, zero-filled, so that state can be read and written by name."""
        for group in self.param_groups:
            for param in group["params"]:
                slots = self.state[param]
                for name in STATE_SLOTS[group["rule"]]:
                    slots[name] = zeros_like(param, torch.float32)
                if group["rule"] == ADAMW:
                    slots[STEP] = torch.zeros((), dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        updates: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]] = []
        for group in self.param_groups:
            if group["rule"] == ADAMW:
                self._adamw(group)
                continue
            for param in group["params"]:
                if param.grad is None:
                    continue
                momentum = self.state[param]["momentum"]
                updates.append((group, param, with_momentum(param.grad, momentum, self.optim)))
        self._orthogonalise([u for u in updates if u[0]["rule"] == MUON])
        self._normalise([u for u in updates if u[0]["rule"] == NSGD])

    @staticmethod
    def _apply(group: dict[str, Any], param: torch.Tensor, update: torch.Tensor) -> None:
        if group["weight_decay"]:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update.reshape(param.shape).to(param.dtype), alpha=-group["lr"])

    def _orthogonalise(
        self, updates: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]
    ) -> None:
        stacked = [
            update if group["stack"] == 1 else update.view(group["stack"], -1, update.size(-1))
            for group, _, update in updates
        ]
        whole = [
            self._gathered(update, group["tp_axis"])
            for (group, _, _), update in zip(updates, stacked, strict=True)
        ]
        blocks = [group["row_blocks"] for group, _, _ in updates]
        for (group, param, _), update in zip(
            updates, orthogonalised(whole, blocks, self.optim), strict=True
        ):
            self._apply(group, param, self._own_shard(update, group["tp_axis"]))

    def _normalise(self, updates: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]) -> None:
        if not updates:
            return
        squares = torch.stack([update.square().sum() for _, _, update in updates])
        if self.tensor_group is not None:
            # Cut tensors add their shards' squares; replicated ones count on one rank only.
            counts = [
                g["tp_axis"] is not None or self.tensor_group.rank() == 0 for g, _, _ in updates
            ]
            squares *= torch.tensor(counts, dtype=squares.dtype, device=squares.device)
            dist.all_reduce(squares, group=self.tensor_group)
        shards = self.tensor_group.size() if self.tensor_group is not None else 1
        norms = squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        for (group, param, update), norm in zip(updates, norms, strict=True):
            numel = param.numel() * (shards if group["tp_axis"] is not None else 1)
            # divided first: a zero tensor has a zero update, not 0 x infinity
            self._apply(group, param, update.div(norm).mul_(math.sqrt(numel)))

    def _gathered(self, shard: torch.Tensor, axis: int | None) -> torch.Tensor:
        if self.tensor_group is None or axis is None:
            return shard
        shards = [torch.empty_like(shard) for _ in range(self.tensor_group.size())]
        dist.all_gather(shards, shard.contiguous(), group=self.tensor_group)
        return torch.cat(shards, dim=axis)

    def _own_shard(self, tensor: torch.Tensor, axis: int | None) -> torch.Tensor:
        if self.tensor_group is None or axis is None:
            return tensor
        return tensor.chunk(self.tensor_group.size(), dim=axis)[self.tensor_group.rank()]

    def _adamw(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        slots = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in slots],
            [s["exp_avg_sq"] for s in slots],
            [],
            [s["step"] for s in slots],
            amsgrad=False,
            beta1=self.optim.beta1,
            beta2=self.optim.beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.optim.eps,
            maximize=False,
        )
