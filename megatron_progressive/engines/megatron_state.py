"""This rank's boxes of a Megatron-core model and optimizer.

Reads private parts of ``DistributedOptimizer`` (megatron-core 0.19.2): the flat range of each
parameter that this data-parallel rank owns, and the fp32 shard that stands for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_progressive.engines.megatron_model import EMBEDDING, TIED_HEAD
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.runtime.groups import ProcessGroups
from megatron_progressive.state.boxes import (
    MASTER,
    PARAM,
    Box,
    Piece,
    ShardedState,
    flat_range_boxes,
    scalar_piece,
)


def table_with_tied_head(table: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensor table, with the name that a tied head has on the last virtual stage."""
    return {TIED_HEAD: table[EMBEDDING], **table}


def local_box(name: str, spec: TensorSpec, parameter: torch.Tensor, groups: ProcessGroups) -> Box:
    """The box of a global tensor that this rank's parameter is.

    Raises:
        RuntimeError: Megatron-core built another shape than the family's table says.
    """
    shape, offset = list(spec.shape), [0] * len(spec.shape)
    if spec.tp_axis is not None:
        shape[spec.tp_axis] //= groups.layout.tensor
        offset[spec.tp_axis] = shape[spec.tp_axis] * groups.tensor_rank
    if tuple(shape) != tuple(parameter.shape):
        raise RuntimeError(f"{name}: Megatron-core built {tuple(parameter.shape)}, not {shape}")
    return Box(tuple(offset), tuple(shape))


def sharded_state(
    parameters: dict[str, torch.nn.Parameter],
    table: dict[str, TensorSpec],
    optimizer: MegatronOptimizer,
    groups: ProcessGroups,
) -> ShardedState:
    """Views of every weight and optimizer slot that this rank holds.

    Args:
        parameters: of all model chunks, by canonical name (:func:`canonical_names`).
        table: of the global model, the tied head included.
    """
    tied_model = TIED_HEAD in parameters and EMBEDDING not in parameters
    pieces: list[Piece] = []
    for local_name, parameter in parameters.items():
        spec = table[local_name]
        tied = tied_model and local_name == TIED_HEAD and table[local_name] is table[EMBEDDING]
        name = EMBEDDING if tied else local_name
        box = local_box(name, spec, parameter, groups)
        # Ranks that hold the same box: all tensor-parallel ranks of an uncut tensor, and all
        # data-parallel ranks of what is not sharded over them.
        tensor_replica = groups.tensor_rank if spec.tp_axis is None else 0
        data_replica = groups.data_rank + groups.layout.data * tensor_replica
        pieces.append(
            Piece(name, PARAM, spec.shape, box, parameter.data, data_replica, tied)
        )  # fmt: skip
        if isinstance(optimizer, DistributedOptimizer):
            pieces.extend(
                _shard_pieces(name, spec, box, parameter, optimizer, tensor_replica, tied)
            )
        else:
            pieces.extend(
                _replicated_pieces(name, spec, box, parameter, optimizer, data_replica, tied)
            )
    return ShardedState(pieces)


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
        yield Piece(name, MASTER, spec.shape, box, main.data, replica, tied)
    for slot, value in optimizer.optimizer.state[parameter if main is None else main].items():
        if value.dim() == 0:
            yield scalar_piece(name, slot, value, replica, tied)
        else:
            yield Piece(name, slot, spec.shape, box, value, replica, tied)


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
