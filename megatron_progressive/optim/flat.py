"""AdamW and Muon-NSGD on flat partitions, as ZeRO cuts them.

A partition is a flat fp32 tensor that holds, for each of several tensors, the part that this
data-parallel rank owns. The mathematics is that of :mod:`.muon_nsgd` and of torch's AdamW;
state lies where the weights do. AdamW counts steps per tensor, so that layers that are new at τ
start at step zero. What needs a whole tensor is exchanged over the data-parallel group: of
vectors the squared norms, of matrices that are cut the update itself, a bounded number of them
at a time, and each is orthogonalised by one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from megatron_progressive.config import OptimSection
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.optim.lr_factor import lr_factor
from megatron_progressive.optim.muon_nsgd import (
    orthogonalised,
    with_momentum,
)
from megatron_progressive.optim.rules import ADAMW, MUON, NSGD, STATE_SLOTS, STEP, rule_of
from megatron_progressive.runtime.memory import zeros_like

EXCHANGE_NUMEL = 1 << 24
"""Elements of matrices that a rank gathers and orthogonalises at a time (or one matrix)."""


@dataclass(frozen=True)
class Cut:
    """One tensor, as the data-parallel ranks have cut it."""

    name: str
    spec: TensorSpec
    ranges: tuple[tuple[int, int], ...]
    """Flat range [start, end) of the tensor that each rank holds; empty where none."""
    offset: int
    """Where this rank's range starts in its partition."""

    @cached_property
    def holders(self) -> list[int]:
        return [rank for rank, (start, end) in enumerate(self.ranges) if start < end]


@dataclass
class Fragment:
    """This rank's part of a tensor: views of the partition, and the optimizer's slots."""

    cut: Cut
    rule: str
    weight: torch.Tensor
    """fp32 [end - start]; the weight that the optimizer updates."""
    lr_factor: float = 1.0
    """Of the learning rate, not of the weight decay."""
    slots: dict[str, torch.Tensor] = field(default_factory=dict)
    """``step`` is a number, the others are fp32 [end - start]."""

    def part(self, partition: torch.Tensor) -> torch.Tensor:
        """The fragment of a tensor that is laid out as the partition is."""
        return partition.view(-1)[self.cut.offset : self.cut.offset + self.weight.numel()]


class FlatOptimizer(torch.optim.Optimizer):
    """One optimizer for all tensors. ``attach`` says how ZeRO has laid them out.

    Args:
        params: the model's parameters; whoever cuts them puts partitions in their place.
        optim: hyperparameters; ``lr`` is the initial one, later set on the groups.
        rank: of this process in the data-parallel group.
        group: the data-parallel group; None where every rank holds whole tensors.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        optim: OptimSection,
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__([{"params": list(params)}], dict(lr=optim.lr))
        self.optim = optim
        self.rank = rank
        self.group = group if group is not None and group.size() > 1 else None
        self._fragments: dict[torch.Tensor, list[Fragment]] = {}

    def attach(self, param: torch.Tensor, partition: torch.Tensor, cuts: Sequence[Cut]) -> None:
        """Say which tensors lie in ``partition``, and allocate their state (zero).

        ``param`` is what stands for the partition in the parameter groups. Every rank names the
        same tensors in the same order, also those of which it holds nothing.
        """
        fragments = []
        for cut in cuts:
            start, end = cut.ranges[self.rank]
            weight = partition.detach().view(-1)[cut.offset : cut.offset + end - start]
            factor = lr_factor(cut.spec, self.optim)
            fragment = Fragment(cut, rule_of(cut.spec, self.optim), weight, factor)
            if start < end:
                fragment.slots = {name: zeros_like(weight) for name in STATE_SLOTS[fragment.rule]}
                if fragment.rule == ADAMW:
                    fragment.slots[STEP] = torch.zeros((), dtype=torch.float32)
            fragments.append(fragment)
        self._fragments[param] = fragments

    def fragments(self) -> Iterator[Fragment]:
        """Every tensor's fragment on this rank, empty ones included."""
        for fragments in self._fragments.values():
            yield from fragments

    def gradient(self, param: torch.Tensor) -> torch.Tensor:
        """The gradient of a partition, laid out as it is."""
        assert param.grad is not None
        return param.grad

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the partitions in the groups. Collective over the data-parallel group."""
        for group in self.param_groups:
            for param in group["params"]:
                fragments = self._fragments[param]
                gradient = self.gradient(param)
                self._adamw([f for f in fragments if f.rule == ADAMW], gradient, group["lr"])
                self._normalise([f for f in fragments if f.rule == NSGD], gradient, group["lr"])
                self._muon([f for f in fragments if f.rule == MUON], gradient, group["lr"])

    def _decay(self, fragment: Fragment) -> float:
        return self.optim.weight_decay if len(fragment.cut.spec.shape) > 1 else 0.0

    def _apply(self, fragment: Fragment, update: torch.Tensor, lr: float) -> None:
        fragment.weight.mul_(1 - lr * self._decay(fragment))
        fragment.weight.add_(update, alpha=-lr * fragment.lr_factor)

    def _adamw(self, fragments: list[Fragment], gradient: torch.Tensor, lr: float) -> None:
        held = [f for f in fragments if f.slots]
        for decay, factor in sorted({(self._decay(f), f.lr_factor) for f in held}):
            same = [f for f in held if (self._decay(f), f.lr_factor) == (decay, factor)]
            adamw(
                [f.weight for f in same],
                [f.part(gradient) for f in same],
                [f.slots["exp_avg"] for f in same],
                [f.slots["exp_avg_sq"] for f in same],
                [],
                [f.slots[STEP] for f in same],
                amsgrad=False,
                beta1=self.optim.beta1,
                beta2=self.optim.beta2,
                lr=lr * factor,
                weight_decay=decay / factor,
                eps=self.optim.eps,
                maximize=False,
            )

    def _update(self, fragment: Fragment, gradient: torch.Tensor) -> torch.Tensor:
        """The update before it is normalised: fp32, flat, empty where the rank holds nothing."""
        if not fragment.slots:
            return fragment.weight
        return with_momentum(fragment.part(gradient), fragment.slots["momentum"], self.optim)

    def _normalise(self, fragments: list[Fragment], gradient: torch.Tensor, lr: float) -> None:
        if not fragments:
            return
        updates = [self._update(f, gradient) for f in fragments]
        squares = torch.stack([update.square().sum() for update in updates])
        if self.group is not None:
            dist.all_reduce(squares, group=self.group)
        norms = squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        for fragment, update, norm in zip(fragments, updates, norms, strict=True):
            # divided first: a zero tensor has a zero update, not 0 x infinity
            update = update.div(norm).mul_(math.sqrt(fragment.cut.spec.numel))
            self._apply(fragment, update, lr)

    def _muon(self, fragments: list[Fragment], gradient: torch.Tensor, lr: float) -> None:
        """Whole matrices where they are; the others are exchanged, the same ones on all ranks."""
        own = [f for f in fragments if f.cut.holders == [self.rank]]
        for some in _batches(own, EXCHANGE_NUMEL):
            self._orthogonalise_and_apply(some, [self._update(f, gradient) for f in some], lr)
        shared = [f for f in fragments if len(f.cut.holders) > 1]
        ranks = self.group.size() if self.group is not None else 1
        for some in _batches(shared, EXCHANGE_NUMEL * ranks):
            exchange = _Exchange([f.cut for f in some], self.rank, self.group)
            whole = exchange.gather([self._update(f, gradient) for f in some])
            owned = [exchange.cuts[i].spec for i in exchange.owned]
            updates = self._orthogonalised(whole, owned)
            for fragment, update in zip(some, exchange.scatter(updates), strict=True):
                self._apply(fragment, update, lr)

    def _orthogonalise_and_apply(
        self, fragments: list[Fragment], updates: list[torch.Tensor], lr: float
    ) -> None:
        specs = [f.cut.spec for f in fragments]
        for fragment, update in zip(fragments, self._orthogonalised(updates, specs), strict=True):
            self._apply(fragment, update, lr)

    def _orthogonalised(
        self, updates: list[torch.Tensor], specs: list[TensorSpec]
    ) -> list[torch.Tensor]:
        """Flat whole matrices in, their flat scaled updates out."""
        matrices = [u.view(spec.shape) for u, spec in zip(updates, specs, strict=True)]
        blocks = [spec.row_blocks for spec in specs]
        return [u.reshape(-1) for u in orthogonalised(matrices, blocks, self.optim)]


def _batches(fragments: list[Fragment], most: int) -> Iterator[list[Fragment]]:
    """Consecutive fragments whose whole tensors have at most ``most`` elements, or one."""
    batch: list[Fragment] = []
    room = most
    for fragment in fragments:
        numel = fragment.cut.spec.numel
        if batch and numel > room:
            yield batch
            batch, room = [], most
        batch.append(fragment)
        room -= numel
    if batch:
        yield batch


class _Exchange:
    """Cut tensors to one owner each and back, in two all-to-alls over the data-parallel group.

    Each rank derives the same owners from the same cuts. An element travels once each way, as
    in a reduce-scatter followed by an all-gather.
    """

    def __init__(self, cuts: list[Cut], rank: int, group: dist.ProcessGroup | None) -> None:
        self.cuts, self.rank, self.group = cuts, rank, group
        self.ranks = len(cuts[0].ranges)
        load = [0] * self.ranks
        owners = [0] * len(cuts)
        # the largest first, each to the rank that has least
        for i in sorted(range(len(cuts)), key=lambda i: (-cuts[i].spec.numel, i)):
            owners[i] = min(range(self.ranks), key=lambda r: (load[r], r))
            load[owners[i]] += cuts[i].spec.numel
        self._of = [[i for i, o in enumerate(owners) if o == r] for r in range(self.ranks)]
        self.owned = self._of[rank]

    def _length(self, cut: int, rank: int) -> int:
        start, end = self.cuts[cut].ranges[rank]
        return end - start

    def _all_to_all(
        self, sent: list[torch.Tensor], out: list[int], arriving: list[int]
    ) -> torch.Tensor:
        buffer = torch.cat(sent)
        received = buffer.new_empty(sum(arriving))
        dist.all_to_all_single(received, buffer, arriving, out, group=self.group)
        return received

    def gather(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's part of every tensor in; the whole tensors that it owns out."""
        out = [sum(self._length(i, self.rank) for i in self._of[r]) for r in range(self.ranks)]
        arriving = [sum(self._length(i, r) for i in self.owned) for r in range(self.ranks)]
        sent = [parts[i] for r in range(self.ranks) for i in self._of[r]]
        self._nothing = parts[0].new_empty(0)
        received = self._all_to_all(sent, out, arriving)
        whole = [received.new_empty(self.cuts[i].spec.numel) for i in self.owned]
        position = 0
        for r in range(self.ranks):
            for i, tensor in zip(self.owned, whole, strict=True):
                start, end = self.cuts[i].ranges[r]
                tensor[start:end] = received[position : position + end - start]
                position += end - start
        return whole

    def scatter(self, whole: list[torch.Tensor]) -> list[torch.Tensor]:
        """The whole tensors that this rank owns in; its part of every tensor out."""
        out = [sum(self._length(i, r) for i in self.owned) for r in range(self.ranks)]
        arriving = [sum(self._length(i, self.rank) for i in self._of[r]) for r in range(self.ranks)]
        sent = [
            tensor[slice(*self.cuts[i].ranges[r])]
            for r in range(self.ranks)
            for i, tensor in zip(self.owned, whole, strict=True)
        ]
        received = self._all_to_all([*sent, self._nothing], out, arriving)
        parts: dict[int, Any] = {}
        position = 0
        for r in range(self.ranks):
            for i in self._of[r]:
                length = self._length(i, self.rank)
                parts[i] = received[position : position + length]
                position += length
        return [parts[i] for i in range(len(self.cuts))]
