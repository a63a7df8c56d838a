"""Muon-NSGD in Megatron-core's distributed optimizer, with one owner of each matrix.

DDP's buffers are laid out so that nearly every tensor lies whole in one data-parallel rank's share
(:func:`.owners.owner_places`). The distributed optimizer reduce-scatters gradients and all-gathers
weights as it does for AdamW, and its inner optimizer is
:class:`~megatron_progressive.optim.flat.FlatOptimizer` on the shares.

This module reads private parts of ``DistributedOptimizer`` (megatron-core 0.19.2): the shard that
stands for a parameter in the groups of the inner optimizer, and the places of parameters in its
buffers. It accepts an optimizer that is not Adam because of the ``init_state_fn`` that it is given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import group_params_for_buffers
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout, PerBufferParamLayout

from megatron_progressive.config import OptimSection
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.optim.flat import Cut, FlatOptimizer, Fragment
from megatron_progressive.optim.owners import BufferTensor, Place, bucket_numel, owner_places
from megatron_progressive.optim.rules import rule_of
from megatron_progressive.runtime.groups import ProcessGroups


def _shared_by_stages(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is an embedding of which two pipeline stages have copies."""
    return getattr(parameter, "shared_embedding", False)


def owner_layout(
    parameters: dict[str, torch.nn.Parameter],
    table: dict[str, TensorSpec],
    optim: OptimSection,
    groups: ProcessGroups,
    buffers: DistributedDataParallelConfig,
    whole_embedding: bool,
) -> FullParamLayout:
    """The layout of one model chunk's buffers for DDP, with tensors whole in the shares of ranks.

    Args:
        parameters: the parameters of the chunk by canonical name, in the order of registration.
        whole_embedding: the answer of :func:`.partitions.shared_embedding_is_whole`.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    grouped = group_params_for_buffers(list(names), buffers.grad_reduce_in_fp32)
    layouts = {}
    for key, (members, indices) in grouped.items():
        ranks = groups.layout.expert_data if key.is_expert_parallel else groups.layout.replicas
        tensors = [
            BufferTensor(
                names[p],
                p.numel(),
                rule_of(table[names[p]], optim),
                alone=_shared_by_stages(p) and not whole_embedding,
                first=_shared_by_stages(p) and whole_embedding,
            )
            for p in members
        ]
        places = owner_places(tensors, ranks, bucket_numel(groups.layout.replicas))
        layouts[key] = _buffer_layout(members, places, indices, ranks)
    return FullParamLayout(layouts=layouts)


def _buffer_layout(
    members: list[torch.nn.Parameter], places: list[Place], indices: list[int], ranks: int
) -> PerBufferParamLayout:
    """Places as Megatron-core writes them down, from the start of the buffer."""
    shares = dict(sorted((place.bucket, place.share) for place in places))
    buckets, end = [], 0
    for share in shares.values():
        buckets.append((end, end + share * ranks))
        end += share * ranks
    spans = {}
    for parameter, place in zip(members, places, strict=True):
        start = buckets[place.bucket][0] + place.start
        spans[parameter] = (start, start + place.numel, place.bucket)
    return PerBufferParamLayout(
        param_index_map=spans,
        bucket_indices=buckets,
        per_bucket_numel_unpadded=[
            sum(place.numel for place in places if place.bucket == bucket) for bucket in shares
        ],
        param_indices=indices,
        num_optimizer_shards=ranks,
    )


class OwnerOptimizer(FlatOptimizer):
    """The inner optimizer of the distributed optimizer, whose groups hold a shard of each tensor of
    which this rank owns some. Collective over the data- and the tensor-parallel group.

    Where the first and the last stage have copies of an embedding, the first stage has the update
    and sends it: each rank sends its part to the rank that owns the same part of the other copy.
    """

    def attach_shards(
        self,
        wrapper: DistributedOptimizer,
        parameters: dict[str, torch.nn.Parameter],
        table: dict[str, TensorSpec],
        tensor_ranks: int,
        groups: ProcessGroups,
    ) -> None:
        """Allocate the state, which is zero, of what this rank owns of the buffers of ``wrapper``.

        Args:
            parameters: the parameters by canonical name.
            tensor_ranks: the number of tensor-parallel ranks that cut them.
            groups: the process groups of the engine, for the stages that share an embedding.
        """
        names = {parameter: name for name, parameter in parameters.items()}
        self._stages = groups.embedding_group
        self._all: list[Fragment] = []
        self._sent: set[str] = set()
        self._received: set[str] = set()
        for buffer in wrapper.buffers:
            for parameter in buffer.params:
                name = names[parameter]
                start, end, bucket = buffer.param_index_map[parameter]
                first, last = buffer.bucket_indices[bucket]
                share = (last - first) // wrapper.data_parallel_group.size()
                place = Place(start - first, end - start, share)
                ranges = {rank: place.owned(rank) for rank in place.ranks()}
                cut = Cut(name, table[name], ranges, tensor_ranks=tensor_ranks)
                if self.rank in ranges:
                    group, order = wrapper.model_param_group_index_map[parameter]
                    shard = self.param_groups[group]["params"][order]
                else:
                    shard = torch.empty(0, dtype=torch.float32, device=parameter.device)
                fragment = self.fragment(shard, shard, cut)
                if fragment.slots:
                    self.state[shard] = fragment.slots
                self._all.append(fragment)
                if _shared_by_stages(parameter):
                    (self._sent if groups.first_stage else self._received).add(name)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the shards in the groups, from their gradients."""
        self.update(self._all, self.param_groups[0]["lr"])

    def _muon(self, fragments: list[Fragment], lr: float) -> None:
        super()._muon([f for f in fragments if f.cut.name not in self._received], lr)
        received = [f for f in fragments if f.cut.name in self._received and f.slots]
        updates = [torch.empty_like(update) for update in self._updates(received)]
        for update in updates:
            dist.broadcast(update, group=self._stages, group_src=0)
        super()._apply(received, updates, lr)

    def _apply(self, fragments: list[Fragment], updates: list[torch.Tensor], lr: float) -> None:
        updates = list(updates)
        for i, fragment in enumerate(fragments):
            if fragment.cut.name in self._sent and fragment.slots:
                updates[i] = updates[i].contiguous()
                dist.broadcast(updates[i], group=self._stages, group_src=0)
        super()._apply(fragments, updates, lr)


class WholeOptimizer(FlatOptimizer):
    """The optimizer of ZeRO stage 0: every data-parallel rank updates every tensor, as far as its
    tensor-parallel shard goes. Collective over the tensor-parallel group."""

    def attach_whole(
        self,
        parameters: dict[str, torch.nn.Parameter],
        table: dict[str, TensorSpec],
        tensor_ranks: int,
    ) -> None:
        """Allocate the state, which is zero, once the wrapper has put fp32 copies in place of bf16
        weights.

        Args:
            parameters: the parameters of the model by canonical name.
            tensor_ranks: the number of tensor-parallel ranks that cut them.
        """
        self._all: list[Fragment] = []
        for name, parameter in parameters.items():
            weight = getattr(parameter, "main_param", parameter)
            held = {self.rank: (0, weight.numel())}
            cut = Cut(name, table[name], held, tensor_ranks=tensor_ranks)
            fragment = self.fragment(weight, weight, cut)
            self.state[weight] = fragment.slots
            self._all.append(fragment)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all tensors, from their gradients."""
        self.update(self._all, self.param_groups[0]["lr"])
