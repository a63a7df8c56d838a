"""The boxes that this rank holds of a Megatron-core model and its optimizer.

This module reads private parts of ``DistributedOptimizer`` (megatron-core 0.19.2): the flat range
of each parameter that this data-parallel rank owns, and the fp32 shard that stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer

from megatron_progressive.engines.megatron.model import EMBEDDING, TIED_HEAD
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.reshard.boxes import (
    MASTER,
    PARAM,
    Box,
    Piece,
    ShardedState,
    flat_range_boxes,
    scalar_piece,
    whole,
)
from megatron_progressive.runtime.groups import ProcessGroups


def table_with_tied_head(table: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The table of tensors, with the name that a tied head has on the last virtual stage."""
    return {TIED_HEAD: table[EMBEDDING], **table}


def local_box(name: str, spec: TensorSpec, parameter: torch.Tensor, groups: ProcessGroups) -> Box:
    """The box of a global tensor that is this rank's parameter.

    The parameter may have fewer axes: it is the box, flattened along its first axes.

    Raises:
        RuntimeError: Megatron-core built another shape than the family's table has.
    """
    ranks, rank = groups.layout.tensor, groups.tensor_rank
    if spec.expert is not None:
        ranks, rank = groups.layout.expert_tensor, groups.expert_tensor_rank
    shape, offset = list(spec.shape), [0] * len(spec.shape)
    if spec.tp_axis is not None:
        shape[spec.tp_axis] //= ranks
        offset[spec.tp_axis] = shape[spec.tp_axis] * rank
    built = tuple(parameter.shape)
    merged = 1 + len(shape) - len(built)  # its first axis is the first ones of the tensor
    if (math.prod(shape[:merged]), *shape[merged:]) != built:
        raise RuntimeError(f"{name}: Megatron-core built {built}, not {shape}")
    return Box(tuple(offset), tuple(shape))


def _replicas(spec: TensorSpec, groups: ProcessGroups) -> tuple[int, int]:
    """Two numbers of this rank: among all ranks that hold the same box of a tensor, and among those
    of them that hold the same shard of it under a distributed optimizer.

    All data- and context-parallel ranks hold the same box, and so do all tensor-parallel ranks of a
    tensor that is not cut.
    """
    if spec.expert is not None:
        across = groups.expert_tensor_rank if spec.tp_axis is None else 0
        return groups.expert_data_rank + groups.layout.expert_data * across, across
    across = groups.tensor_rank if spec.tp_axis is None else 0
    return groups.replica_rank + groups.layout.replicas * across, across


def sharded_state(
    parameters: dict[str, torch.nn.Parameter],
    buffers: dict[str, torch.Tensor],
    table: dict[str, TensorSpec],
    optimizers: Sequence[MegatronOptimizer],
    groups: ProcessGroups,
) -> ShardedState:
    """Views of every weight and optimizer slot that this rank holds.

    Args:
        parameters: the parameters of all model chunks by canonical name (:func:`canonical_names`).
        buffers: the tensors that no optimizer has, by canonical name.
        table: the table of the global model, including the tied head.
        optimizers: the optimizers, one of which has each parameter.
    """
    pieces: list[Piece] = []
    owners = {
        parameter: optimizer
        for optimizer in optimizers
        for parameter in model_parameters(optimizer)
    }
    for local_name, parameter in parameters.items():
        spec = table[local_name]
        head = local_name == TIED_HEAD and table[local_name] is table[EMBEDDING]
        # a tied head, or the embedding that multi-token prediction has, on a later stage
        tied = (head or local_name == EMBEDDING) and not groups.first_stage
        name = EMBEDDING if head else local_name
        box = local_box(name, spec, parameter, groups)
        replica, across = _replicas(spec, groups)
        pieces.append(
            Piece(name, PARAM, spec.shape, box, parameter.data.view(box.shape), replica, tied)
        )
        optimizer = owners[parameter]
        if isinstance(optimizer, DistributedOptimizer):
            pieces.extend(_shard_pieces(name, spec, box, parameter, optimizer, across, tied))
        else:
            pieces.extend(_replicated_pieces(name, spec, box, parameter, optimizer, replica, tied))
    for name, buffer in buffers.items():
        spec = table[name]
        replica, _ = _replicas(spec, groups)
        pieces.append(Piece(name, PARAM, spec.shape, whole(spec.shape), buffer, replica))
    return ShardedState(pieces)


def model_parameters(optimizer: MegatronOptimizer) -> list[torch.nn.Parameter]:
    """The model's parameters that an optimizer updates, including those whose shard is on another
    rank."""
    if getattr(optimizer, "is_stub_optimizer", False):
        return []
    if isinstance(optimizer, DistributedOptimizer):
        return [p for buffer in optimizer.buffers for p in buffer.params]
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        groups = [*optimizer.float16_groups, *optimizer.fp32_from_fp32_groups]
        return [parameter for group in groups for parameter in group]
    return [p for group in optimizer.param_groups for p in group["params"]]


def _replicated_pieces(
    name: str,
    spec: TensorSpec,
    box: Box,
    parameter: torch.nn.Parameter,
    optimizer: MegatronOptimizer,
    replica: int,
    tied: bool,
) -> Iterator[Piece]:
    main = getattr(parameter, "main_param", None)
    if main is not None:
        yield Piece(name, MASTER, spec.shape, box, main.data.view(box.shape), replica, tied)
    for slot, value in optimizer.optimizer.state[parameter if main is None else main].items():
        if value.dim() == 0:
            yield scalar_piece(name, slot, value, replica, tied)
        else:
            yield Piece(name, slot, spec.shape, box, value.view(box.shape), replica, tied)


def _shard_pieces(
    name: str,
    spec: TensorSpec,
    box: Box,
    parameter: torch.nn.Parameter,
    optimizer: DistributedOptimizer,
    replica: int,
    tied: bool,
) -> Iterator[Piece]:
    if parameter not in optimizer.model_param_gbuf_map:
        return  # this rank's share of the buffer has nothing of it
    owned = optimizer._get_model_param_range_map(parameter)["param"]
    group, order = optimizer.model_param_group_index_map[parameter]
    shard = optimizer.optimizer.param_groups[group]["params"][order]
    slots = dict(optimizer.optimizer.state[shard])
    if parameter.dtype != torch.float32:  # in fp32 the shard is a view of the weight itself
        slots[MASTER] = shard.data
    for slot, value in slots.items():
        if value.dim() == 0:
            first = 0 if owned.start == 0 else 1  # each rank with a shard has the number
            yield scalar_piece(name, slot, value, replica + first, tied)
            continue
        for part, low, high in flat_range_boxes(box, owned.start, owned.end):
            view = value[low - owned.start : high - owned.start].view(part.shape)
            yield Piece(name, slot, spec.shape, part, view, replica, tied)
