"""AdamW and Muon-NSGD on flat partitions, as ZeRO cuts them.

A partition is a flat fp32 tensor that holds, for each of several tensors, the part that this
data-parallel rank owns. The mathematics is that of :mod:`.muon` and of torch's AdamW; the state
lies where the weights do. AdamW counts the steps of each tensor, so that layers that are new at τ
start at step zero. A tensor that lies whole on one rank is updated there. For a tensor that is cut,
the data-parallel group exchanges the squared norms of its parts (of a vector) or the update itself
(of a matrix, a bounded number of elements at a time). Shards of tensor-parallel ranks are exchanged
likewise. One rank of all orthogonalises each matrix.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from megatron_progressive.config import OptimSection
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.optim.exchange import Exchange, Parted
from megatron_progressive.optim.lr_factor import lr_factor
from megatron_progressive.optim.muon import muon_updates, normalised, squares_of, with_momentum
from megatron_progressive.optim.rules import ADAMW, MUON, NSGD, STATE_SLOTS, STEP, rule_of

SHARES = "shares"
"""The key of a parameter group under which it has the shares of the learning rate."""

EXCHANGE_NUMEL = 1 << 24
"""How many elements of matrices a rank gathers and orthogonalises at a time; at least one
matrix."""


@dataclass(frozen=True)
class Cut:
    """How the data-parallel ranks have cut one tensor."""

    name: str
    spec: TensorSpec
    """The specification of the whole tensor."""
    ranges: Mapping[int, tuple[int, int]]
    """The flat range [start, end) of the tensor that each rank holds, for the ranks that hold
    some."""
    offset: int = 0
    """The place in this rank's partition where its range starts."""
    tensor_ranks: int = 1
    """The number of tensor-parallel ranks. Data-parallel ranks cut what each of these has of the
    tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor on one tensor-parallel rank."""
        axis = self.spec.tp_axis
        return tuple(
            size // self.tensor_ranks if i == axis else size
            for i, size in enumerate(self.spec.shape)
        )

    @cached_property
    def numel(self) -> int:
        """The number of elements of the tensor on one tensor-parallel rank."""
        return math.prod(self.shape)

    @property
    def shared(self) -> bool:
        """Whether several data-parallel ranks hold parts of it."""
        return len(self.ranges) > 1

    def range_of(self, rank: int) -> tuple[int, int]:
        """The range that a data-parallel rank holds; (0, 0) where it holds nothing."""
        return self.ranges.get(rank, (0, 0))


@dataclass
class Fragment:
    """This rank's part of a tensor, as views of the partition, with its optimizer state."""

    cut: Cut
    rule: str
    weight: torch.Tensor
    """The weight that the optimizer updates, fp32 [end - start]."""
    param: torch.Tensor
    """The parameter that stands for the partition in the parameter groups."""
    lr_factor: float = 1.0
    """The factor of the learning rate; it does not change the weight decay."""
    slots: dict[str, torch.Tensor] = field(default_factory=dict)
    """The optimizer state: ``step`` is a number, the other slots are fp32 [end - start]. There are
    none where the rank holds nothing."""

    def part(self, partition: torch.Tensor) -> torch.Tensor:
        """The fragment's part of a tensor that is laid out as the partition is."""
        return partition.view(-1)[self.cut.offset : self.cut.offset + self.weight.numel()]


class FlatOptimizer(torch.optim.Optimizer):
    """One optimizer for all tensors. ``attach`` says how ZeRO has laid them out.

    Args:
        params: the parameters of the model, in whose place partitions are put when they are cut.
        optim: the hyperparameters; ``lr`` is the first learning rate, which is later set on the
            groups. Under :data:`SHARES` these may have the shares of it that tensors have, by name.
        rank: the rank of this process in the data-parallel group.
        group: the data-parallel group; None where every rank holds whole tensors.
        tensor_group: the tensor-parallel group; None without tensor parallelism.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        optim: OptimSection,
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        tensor_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__([{"params": list(params)}], dict(lr=optim.lr))
        self.optim = optim
        self.rank = rank
        self.group = group if group is not None and group.size() > 1 else None
        several = tensor_group is not None and tensor_group.size() > 1
        self.tensor_group = tensor_group if several else None
        self._fragments: dict[torch.Tensor, list[Fragment]] = {}
        self._shares: Mapping[str, float] = {}
        self._counted: dict[tuple[bool, ...], torch.Tensor] = {}

    def attach(self, param: torch.Tensor, partition: torch.Tensor, cuts: Sequence[Cut]) -> None:
        """Say which tensors lie in ``partition``, and allocate their state (zero).

        ``param`` is what stands for the partition in the parameter groups. Every rank names the
        same tensors in the same order, including those of which it holds nothing.
        """
        self._fragments[param] = [self.fragment(param, partition, cut) for cut in cuts]

    def fragment(self, param: torch.Tensor, partition: torch.Tensor, cut: Cut) -> Fragment:
        """This rank's part of a tensor, with its state allocated and zero."""
        start, end = cut.range_of(self.rank)
        weight = partition.detach().view(-1)[cut.offset : cut.offset + end - start]
        factor = lr_factor(cut.spec, self.optim)
        fragment = Fragment(cut, rule_of(cut.spec, self.optim), weight, param, factor)
        if start < end:
            fragment.slots = {name: torch.zeros_like(weight) for name in STATE_SLOTS[fragment.rule]}
            if fragment.rule == ADAMW:
                fragment.slots[STEP] = torch.zeros((), dtype=torch.float32)
        return fragment

    def fragments(self) -> Iterator[Fragment]:
        """The fragments of all tensors on this rank, including the empty ones."""
        for fragments in self._fragments.values():
            yield from fragments

    def gradient(self, param: torch.Tensor) -> torch.Tensor:
        """The gradient of a partition, laid out as the partition is."""
        assert param.grad is not None
        return param.grad

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the partitions in the groups. Collective over the data-parallel group."""
        for group in self.param_groups:
            for param in group["params"]:
                self.update(self._fragments[param], group["lr"])

    def update(self, fragments: list[Fragment], lr: float) -> None:
        """Update the weights of fragments, which are of the same tensors in the same order on all
        ranks."""
        self._shares = self.param_groups[0].get(SHARES, {})
        self._adamw([f for f in fragments if f.rule == ADAMW and f.slots], lr)
        self._normalise([f for f in fragments if f.rule == NSGD], lr)
        self._muon([f for f in fragments if f.rule == MUON], lr)

    def _share(self, fragment: Fragment) -> float:
        return self._shares.get(fragment.cut.name, 1.0)

    def _decay(self, fragment: Fragment) -> float:
        return self.optim.weight_decay if len(fragment.cut.spec.shape) > 1 else 0.0

    def _apply(self, fragments: list[Fragment], updates: list[torch.Tensor], lr: float) -> None:
        """Decay weights and add updates to them, all of one decay and rate at once."""
        kinds: dict[tuple[float, float, float], list[int]] = defaultdict(list)
        for i, fragment in enumerate(fragments):
            kinds[self._decay(fragment), fragment.lr_factor, self._share(fragment)].append(i)
        for (decay, factor, share), members in kinds.items():
            weights, rate = [fragments[i].weight for i in members], lr * share
            if decay:
                torch._foreach_mul_(weights, 1 - rate * decay)
            torch._foreach_add_(weights, [updates[i] for i in members], alpha=-rate * factor)

    def _gradient(self, fragment: Fragment) -> torch.Tensor:
        return fragment.part(self.gradient(fragment.param))

    def _adamw(self, held: list[Fragment], lr: float) -> None:
        rates = [(self._decay(f), f.lr_factor, self._share(f)) for f in held]
        for decay, factor, share in sorted(set(rates)):
            same = [
                f for f, rate in zip(held, rates, strict=True) if rate == (decay, factor, share)
            ]
            adamw(
                [f.weight for f in same],
                [self._gradient(f) for f in same],
                [f.slots["exp_avg"] for f in same],
                [f.slots["exp_avg_sq"] for f in same],
                [],
                [f.slots[STEP] for f in same],
                amsgrad=False,
                beta1=self.optim.beta1,
                beta2=self.optim.beta2,
                lr=lr * share * factor,
                weight_decay=decay / factor,
                eps=self.optim.eps,
                maximize=False,
            )

    def _updates(self, fragments: list[Fragment]) -> list[torch.Tensor]:
        """The updates before they are normalised: fp32 and flat, empty where the rank holds
        nothing."""
        held = [f for f in fragments if f.slots]
        grads = [self._gradient(f) for f in held]
        found = iter(with_momentum(grads, [f.slots["momentum"] for f in held], self.optim))
        return [next(found) if f.slots else f.weight for f in fragments]

    def _normalise(self, fragments: list[Fragment], lr: float) -> None:
        shared = self.group is not None and any(f.cut.shared for f in fragments)
        # vectors that lie whole where they are need nothing of the other data-parallel ranks
        fragments = fragments if shared else [f for f in fragments if f.slots]
        if not fragments:
            return
        updates = self._updates(fragments)
        squares = squares_of(updates)
        if shared:
            dist.all_reduce(squares, group=self.group)
        if self.tensor_group is not None:
            # shards add their squares; replicated vectors count on one rank only
            first = self.tensor_group.rank() == 0
            counted = tuple(first or f.cut.spec.tp_axis is not None for f in fragments)
            if counted not in self._counted:  # it goes to the device once
                self._counted[counted] = torch.tensor(counted, device=squares.device).float()
            squares *= self._counted[counted]
            dist.all_reduce(squares, group=self.tensor_group)
        norms = squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        numels = [f.cut.spec.numel for f in fragments]
        self._apply(fragments, normalised(updates, norms, numels), lr)

    def _muon(self, fragments: list[Fragment], lr: float) -> None:
        """Update matrices: those that lie whole on a rank where they are, the others after an
        exchange, the same ones on all ranks."""
        own = [f for f in fragments if f.slots and not f.cut.shared]
        for some in _batches(_by_shape(own), EXCHANGE_NUMEL):
            updates = self._orthogonalised(self._updates(some), [f.cut for f in some])
            self._apply(some, updates, lr)
        shared = [f for f in fragments if f.cut.shared]
        ranks = self.group.size() if self.group is not None else 1
        for some in _batches(_by_shape(shared), EXCHANGE_NUMEL * ranks):
            parts = [Parted(f.cut.numel, f.cut.ranges) for f in some]
            exchange = Exchange(parts, self.rank, self.group)
            whole = exchange.gather(self._updates(some))
            whole = self._orthogonalised(whole, [some[i].cut for i in exchange.owned])
            self._apply(some, exchange.scatter(whole, some[0].weight), lr)

    def _orthogonalised(self, updates: list[torch.Tensor], cuts: list[Cut]) -> list[torch.Tensor]:
        """The scaled updates of flat tensors, as one tensor-parallel rank has them.

        The tensor-parallel ranks, which come with the same tensors, share them out among
        themselves: each matrix is made whole, and orthogonalised, on one of them.
        """
        if not cuts:
            return []
        if self.tensor_group is None:
            return self._whole_orthogonalised(updates, cuts)
        exchange = Exchange(
            [_over_tensor_ranks(cut) for cut in cuts], self.tensor_group.rank(), self.tensor_group
        )
        homed = [cuts[i] for i in exchange.owned]
        shards = exchange.gather(updates)
        whole = [_joined(flat, cut) for flat, cut in zip(shards, homed, strict=True)]
        whole = self._whole_orthogonalised(whole, homed)
        shards = [_parted(flat, cut) for flat, cut in zip(whole, homed, strict=True)]
        return exchange.scatter(shards, updates[0])

    def _whole_orthogonalised(
        self, updates: list[torch.Tensor], cuts: list[Cut]
    ) -> list[torch.Tensor]:
        """The scaled updates, flat, of whole flat tensors."""
        matrices = [u.view(cut.spec.shape) for u, cut in zip(updates, cuts, strict=True)]
        blocks = [cut.spec.row_blocks for cut in cuts]
        return [u.reshape(-1) for u in muon_updates(matrices, blocks, self.optim)]


def _by_shape(fragments: list[Fragment]) -> list[Fragment]:
    """Fragments of tensors of one shape one after the other: they make larger batches for
    Newton-Schulz."""
    shapes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Fragment]] = defaultdict(list)
    for fragment in fragments:
        shapes[fragment.cut.spec.shape, fragment.cut.spec.row_blocks].append(fragment)
    return [fragment for same in shapes.values() for fragment in same]


def _batches(fragments: list[Fragment], most: int) -> Iterator[list[Fragment]]:
    """Batches of consecutive fragments whose whole tensors have at most ``most`` elements together,
    or which are one fragment."""
    batch: list[Fragment] = []
    room = most
    for fragment in fragments:
        numel = fragment.cut.numel
        if batch and numel > room:
            yield batch
            batch, room = [], most
        batch.append(fragment)
        room -= numel
    if batch:
        yield batch


def _over_tensor_ranks(cut: Cut) -> Parted:
    """A tensor as tensor-parallel ranks hold it: their flat shards, one after the other."""
    ranks, numel = range(cut.tensor_ranks), cut.numel
    if cut.spec.tp_axis is None:
        return Parted(numel, dict.fromkeys(ranks, (0, numel)), replicated=True)
    return Parted(numel * len(ranks), {r: (r * numel, (r + 1) * numel) for r in ranks})


def _joined(shards: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The whole flat tensor, made of its flat shards, which come one after the other."""
    if cut.spec.tp_axis is None:
        return shards
    parts = shards.view(cut.tensor_ranks, *cut.shape).unbind()
    return torch.cat(parts, dim=cut.spec.tp_axis).view(-1)


def _parted(whole: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The flat shards of a whole flat tensor, one after the other; the inverse of
    :func:`_joined`."""
    if cut.spec.tp_axis is None:
        return whole
    parts = whole.view(cut.spec.shape).chunk(cut.tensor_ranks, dim=cut.spec.tp_axis)
    return torch.stack(parts).view(-1)
