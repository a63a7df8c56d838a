"""Flat buffers of weights and gradients, which data-parallel ranks may divide (ZeRO stage 1).

Tensors lie in buckets as :func:`.owners.owner_places` says: under Muon-NSGD whole in one rank's
share wherever they fit. Gradients are fp32 sums; with weights in bf16 each share has fp32 master
weights. At stage 0 every rank's share is the whole bucket.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_progressive.config import OptimSection
from megatron_progressive.engines.flat_state import slot_pieces
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.optim.flat import SHARES, Cut, FlatOptimizer
from megatron_progressive.optim.owners import BufferTensor, owner_places
from megatron_progressive.optim.rules import rule_of
from megatron_progressive.reshard.boxes import PARAM, Piece, ShardedState, whole


class Bucket:
    """One bucket: a buffer of weights, one of gradients, and this rank's share of both.

    Args:
        share: the number of elements that one rank updates.
        shares: the number of ranks that divide the bucket; 1 where each rank updates all of it.
        own: the number of this rank's share.
    """

    def __init__(self, share: int, shares: int, own: int, dtype: torch.dtype, device: torch.device):
        size = [share * shares]
        self.weights = torch.zeros(size, dtype=dtype, device=device)
        self.gradients = torch.zeros(size, dtype=torch.float32, device=device)
        self.shares, mine = shares, slice(own * share, (own + 1) * share)
        self.own_weights, self.own_gradients = self.weights[mine], self.gradients[mine]
        fp32 = dtype == torch.float32
        self.partition = (
            self.own_weights if fp32 else torch.zeros(share, dtype=torch.float32, device=device)
        )
        """The fp32 weights that the optimizer updates."""
        self.partition.grad = self.own_gradients

    def reduce(self) -> None:
        """Average the gradients over all ranks, at least those of this rank's share. Collective
        over all ranks."""
        if self.shares == 1:
            dist.all_reduce(self.gradients)
        else:
            dist.reduce_scatter_tensor(self.own_gradients, self.gradients)
        self.own_gradients /= dist.get_world_size()

    def gather(self) -> None:
        """Let the model's weights follow the shares of all ranks after an update. Collective over
        all ranks."""
        if self.partition is not self.own_weights:
            self.own_weights.copy_(self.partition)
        if self.shares > 1:
            dist.all_gather_into_tensor(self.weights, self.own_weights)


class FlatModel:
    """The tensors of a model in buckets, and the optimizer that updates them.

    Making one moves the parameters' data into the buckets, uninitialised to the caller.

    Args:
        parameters: the parameters of the model by canonical name, in the order of ``table``.
        divided: whether the ranks divide the optimizer's work and state.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        table: dict[str, TensorSpec],
        optim: OptimSection,
        divided: bool,
    ) -> None:
        self._parameters, self._table, self._divided = parameters, table, divided
        ranks, self._rank = dist.get_world_size(), dist.get_rank()
        shares, own = (ranks, self._rank) if divided else (1, 0)
        first = next(iter(parameters.values()))
        places = owner_places(
            [BufferTensor(n, spec.numel, rule_of(spec, optim)) for n, spec in table.items()], shares
        )
        sizes = {place.bucket: place.share for place in places}
        self.buckets = [
            Bucket(sizes[number], shares, own, first.dtype, first.device)
            for number in range(len(sizes))
        ]
        cuts: list[list[Cut]] = [[] for _ in self.buckets]
        for (name, spec), place in zip(table.items(), places, strict=True):
            bucket, span = self.buckets[place.bucket], slice(place.start, place.start + place.numel)
            parameter = parameters[name]
            parameter.data = bucket.weights[span].view(parameter.shape)
            _accumulate(parameter, bucket.gradients[span].view(parameter.shape))
            offset = max(0, place.start - own * place.share)
            ranges = {rank: place.owned(rank) for rank in place.ranks()}
            cuts[place.bucket].append(Cut(name, spec, ranges, offset if own in ranges else 0))
        partitions = [bucket.partition for bucket in self.buckets]
        group = dist.group.WORLD if divided else None
        self.optimizer = FlatOptimizer(partitions, optim, own, group)  # type: ignore[arg-type]
        for partition, held in zip(partitions, cuts, strict=True):
            self.optimizer.attach(partition, partition, held)

    def zero_gradients(self) -> None:
        for bucket in self.buckets:
            bucket.gradients.zero_()

    def step(self, lr: float, most: float, shares: Mapping[str, float]) -> torch.Tensor:
        """Average the gradients, clip their norm to ``most`` (0 does not clip) and update the
        weights; returns the norm before, on the device. Collective over all ranks."""
        for bucket in self.buckets:
            bucket.reduce()
        squares = torch.stack([bucket.own_gradients.square().sum() for bucket in self.buckets])
        square = squares.sum()
        if self._divided:
            dist.all_reduce(square)
        norm = square.sqrt()
        if most > 0:
            factor = (most / norm.double()).clamp_max(1.0).float()
            for bucket in self.buckets:
                bucket.own_gradients *= factor
        for group in self.optimizer.param_groups:
            group |= {"lr": lr, SHARES: shares}
        self.optimizer.step()
        for bucket in self.buckets:
            bucket.gather()
        return norm

    def state(self) -> ShardedState:
        """Views of every weight and optimizer slot that this rank holds."""
        pieces = []
        for name, spec in self._table.items():
            weight = self._parameters[name].data.view(spec.shape)
            pieces.append(Piece(name, PARAM, spec.shape, whole(spec.shape), weight, self._rank))
        masters = any(bucket.partition is not bucket.own_weights for bucket in self.buckets)
        replica = None if self._divided else self._rank
        for fragment in self.optimizer.fragments():
            pieces += slot_pieces(fragment, self.optimizer.rank, masters, replica)
        return ShardedState(pieces)


def _accumulate(parameter: torch.nn.Parameter, total: torch.Tensor) -> None:
    """Have the gradients of backward passes added to ``total`` in fp32."""

    # The hook must not hold the parameter, which holds the hook where no collection looks: the
    # memory of a closed engine would stay for ever.
    def add(given: torch.Tensor) -> None:
        if given.grad is not None:
            total.add_(given.grad)
            given.grad = None

    parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
