"""Which rank holds which pieces, from the layout alone.

The same pieces as the engines' ``state()`` (a test compares them), without processes, torch or
Megatron-core: planning looks at thousands of ranks. What is written here of Megatron-core
0.19.2 is the order of ranks (``parallel_state``: tensor fastest, then data, then pipeline), the
order in which a model's parameters are registered (of the local layer spec; Transformer
Engine's registers norms after other linears, which moves the cuts of the distributed optimizer
by a few thousand elements), and how its distributed optimizer cuts a buffer; of DeepSpeed
0.19.8 how ZeRO cuts parameters (``stage_1_and_2.py``, ``bf16_optimizer.py``,
``partition_parameters.py``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_progressive.config import OptimSection
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import ModelShape, TensorSpec, layer_number
from megatron_progressive.optim.rules import ADAMW, STATE_SLOTS, STEP, rule_of
from megatron_progressive.runtime.layout import Layout
from megatron_progressive.state.boxes import (
    MASTER,
    PARAM,
    Box,
    PieceMeta,
    flat_range_boxes,
    whole,
)

Held = tuple[list[PieceMeta], Sequence[int]]
"""Pieces, and the global ranks that each hold all of them."""

_WEIGHT_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_STATE_DTYPE = "float32"

_TENSOR_ALIGNMENT = 64
"""Elements: where a tensor may start in a buffer of the distributed optimizer."""
_BUCKET_ALIGNMENT = 128
"""Elements: the end of a bucket is a multiple of this and of the data-parallel ranks."""
_ZERO_ALIGNMENT = 2
"""Elements: DeepSpeed's share of a flat group is a multiple of this."""


@dataclass(frozen=True)
class _Tensor:
    """One tensor of one model chunk."""

    name: str
    spec: TensorSpec
    tied_copy: bool = False
    """The LM head's copy of a tied embedding, on another stage than the embedding."""
    shared: bool = False
    """Whether the first and the last stage each have a copy of it: a tied embedding."""


def _chunks(shape: ModelShape, layout: Layout) -> list[list[list[_Tensor]]]:
    """The tensors of each model chunk of each stage, as Megatron-core registers them."""
    layers: dict[int, list[_Tensor]] = {number: [] for number in range(shape.num_layers)}
    first: list[_Tensor] = []
    last: list[_Tensor] = []
    head: list[_Tensor] = []
    for name, spec in tensor_table(shape).items():
        number = layer_number(name)
        if number is not None:
            layers[number].append(_Tensor(name, spec))
            continue
        shared = spec.role == "embedding" and shape.tie_embeddings and layout.pipeline > 1
        embedding = spec.role in ("embedding", "position")
        (first if embedding else last).append(_Tensor(name, spec, shared=shared))
        if shared:
            head = [_Tensor(name, spec, tied_copy=True, shared=True)]
    for tensors in layers.values():
        # The base class of attention makes the projection; QKV comes after it.
        at = [i for i, t in enumerate(tensors) if ".self_attention.linear_" in t.name]
        attention = sorted((tensors[i] for i in at), key=lambda t: ".linear_proj." not in t.name)
        for i, tensor in zip(at, attention, strict=True):
            tensors[i] = tensor
    chunks = [
        [[t for number in numbers for t in layers[number]] for numbers in stage]
        for stage in layout.chunk_layers(shape.num_layers)
    ]
    chunks[0][0][:0] = first
    chunks[-1][-1] += last + head  # a head comes behind the final norm
    return chunks


def _local_box(spec: TensorSpec, tensor_rank: int, tensor_ranks: int) -> Box:
    """The box of a tensor that a tensor-parallel rank computes with."""
    if spec.tp_axis is None:
        return whole(spec.shape)
    shape, offset = list(spec.shape), [0] * len(spec.shape)
    shape[spec.tp_axis] //= tensor_ranks
    offset[spec.tp_axis] = shape[spec.tp_axis] * tensor_rank
    return Box(tuple(offset), tuple(shape))


def _state_pieces(
    tensor: _Tensor, boxes: list[Box], optim: OptimSection, precision: str
) -> Iterator[PieceMeta]:
    """What the optimizer keeps of ``boxes`` of a tensor: fp32 weights (bf16 only) and its slots."""
    rule, readable = rule_of(tensor.spec, optim), not tensor.tied_copy
    for slot in (*((MASTER,) if precision == "bf16" else ()), *STATE_SLOTS[rule]):
        for box in boxes:
            yield PieceMeta((tensor.name, slot), box, _STATE_DTYPE, readable)
    if rule == ADAMW:
        yield PieceMeta((tensor.name, STEP), whole((1,)), _STATE_DTYPE, readable)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a buffer whose buckets are each cut into equal shares, one of each
    for every data-parallel rank."""

    start: int
    """Of the tensor, from the start of its bucket."""
    numel: int
    share: int
    """Elements of the bucket on each rank, padding included."""

    def ranks(self) -> range:
        """Data-parallel ranks that own some of the tensor."""
        return range(self.start // self.share, (self.start + self.numel - 1) // self.share + 1)

    def owned(self, data_rank: int) -> tuple[int, int]:
        """The flat range of the tensor that a rank owns; empty where first >= last."""
        low = data_rank * self.share - self.start
        return max(0, low), min(self.numel, low + self.share)


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def distributed_optimizer_places(
    numels: Sequence[int], alone: Sequence[bool], data_ranks: int
) -> list[_Place]:
    """Places of tensors in a model chunk's buffer of Megatron-core's distributed optimizer.

    The buffer has the tensors in reverse order, each at a multiple of 64 elements, in one
    bucket: the engine asks for no overlap of the gradients' reduction, which would cut buckets
    by size. A tensor with ``alone`` (the embedding that two pipeline stages share) has a bucket
    of its own. The end of a bucket is padded to a multiple of 128 and of the ranks.

    Args:
        numels: elements of each tensor, in the order of registration.
    """
    buckets: list[list[int]] = [[]]
    for tensor in reversed(range(len(numels))):
        if alone[tensor]:
            buckets += [[tensor], []]
        else:
            buckets[-1].append(tensor)
    places: dict[int, _Place] = {}
    for bucket in buckets:
        starts, end = [], 0
        for tensor in bucket:
            starts.append(_rounded_up(end, _TENSOR_ALIGNMENT))
            end = starts[-1] + numels[tensor]
        share = _rounded_up(end, math.lcm(data_ranks, _BUCKET_ALIGNMENT)) // data_ranks
        for tensor, start in zip(bucket, starts, strict=True):
            places[tensor] = _Place(start, numels[tensor], share)
    return [places[tensor] for tensor in range(len(numels))]


def zero_places(numels: Sequence[int], data_ranks: int) -> list[_Place]:
    """Places of tensors in DeepSpeed's flat group (ZeRO stages 1 and 2): one after the other,
    in the order of registration, the end padded to a multiple of 2 x ranks."""
    share = _rounded_up(sum(numels), _ZERO_ALIGNMENT * data_ranks) // data_ranks
    starts = itertools.accumulate(numels, initial=0)
    return [_Place(start, numel, share) for start, numel in zip(starts, numels, strict=False)]


def zero_3_places(numels: Sequence[int], data_ranks: int) -> list[_Place]:
    """Places of tensors under DeepSpeed's ZeRO stage 3, which cuts each on its own."""
    return [_Place(0, numel, -(-numel // data_ranks)) for numel in numels]


@dataclass(frozen=True)
class _Partitions:
    """The pieces of one engine, by pipeline, tensor and data-parallel rank."""

    chunks: list[list[list[_Tensor]]]
    optim: OptimSection
    precision: str
    layout: Layout

    @property
    def state_sharded(self) -> bool:
        """Whether optimizer state (master weights too) is divided over data-parallel ranks."""
        if self.layout.engine == "deepspeed":
            return self.layout.zero_stage >= 1
        return self.optim.name == ADAMW and self.layout.zero_stage >= 1

    @property
    def weights_sharded(self) -> bool:
        return self.layout.engine == "deepspeed" and self.layout.zero_stage == 3

    def same(self, stage: int, tensor_rank: int | None) -> list[PieceMeta]:
        """What all data-parallel ranks hold: of the tensors that tensor parallelism cuts, or
        with None of the others, which all tensor-parallel ranks hold as well."""
        pieces = []
        for tensor in (tensor for chunk in self.chunks[stage] for tensor in chunk):
            if (tensor.spec.tp_axis is None) != (tensor_rank is None):
                continue
            box = _local_box(tensor.spec, tensor_rank or 0, self.layout.tensor)
            if not self.weights_sharded:
                pieces.append(self._weight(tensor, box))
            if not self.state_sharded:
                pieces.extend(_state_pieces(tensor, [box], self.optim, self.precision))
        return pieces

    def shards(self, stage: int, tensor_rank: int, data_ranks: range) -> dict[int, list[PieceMeta]]:
        """What each of some data-parallel ranks alone holds."""
        pieces: dict[int, list[PieceMeta]] = {data_rank: [] for data_rank in data_ranks}
        for chunk in self.chunks[stage] if self.state_sharded else []:
            boxes = [_local_box(t.spec, tensor_rank, self.layout.tensor) for t in chunk]
            for tensor, box, place in zip(chunk, boxes, self._places(chunk, boxes), strict=True):
                owners = place.ranks()
                for owner in range(
                    max(owners.start, data_ranks.start), min(owners.stop, data_ranks.stop)
                ):
                    parts = [part for part, _, _ in flat_range_boxes(box, *place.owned(owner))]
                    if self.weights_sharded:
                        pieces[owner].extend(self._weight(tensor, part) for part in parts)
                    pieces[owner].extend(_state_pieces(tensor, parts, self.optim, self.precision))
        return pieces

    def _places(self, chunk: list[_Tensor], boxes: list[Box]) -> list[_Place]:
        numels = [box.numel for box in boxes]
        if self.weights_sharded:
            return zero_3_places(numels, self.layout.data)
        if self.layout.engine == "deepspeed":
            return zero_places(numels, self.layout.data)
        alone = [tensor.shared for tensor in chunk]
        return distributed_optimizer_places(numels, alone, self.layout.data)

    def _weight(self, tensor: _Tensor, box: Box) -> PieceMeta:
        dtype = _WEIGHT_DTYPES[self.precision]
        return PieceMeta((tensor.name, PARAM), box, dtype, not tensor.tied_copy)


def held_pieces(
    shape: ModelShape, optim: OptimSection, precision: str, layout: Layout
) -> Iterator[Held]:
    """All pieces of all ranks, as lists and the ranks that hold each list.

    A rank's pieces are the union of the lists that it appears in: equal to the ``meta`` of
    those of its engine's ``state()``, as a multiset.
    """
    engine = _Partitions(_chunks(shape, layout), optim, precision, layout)
    block = layout.tensor * layout.data
    for stage in range(layout.pipeline):
        ranks = range(stage * block, (stage + 1) * block)
        lists: list[Held] = [(engine.same(stage, None), ranks)]
        for tensor_rank in range(layout.tensor):
            replicas = ranks[tensor_rank :: layout.tensor]
            lists.append((engine.same(stage, tensor_rank), replicas))
            shards = engine.shards(stage, tensor_rank, range(layout.data))
            lists += [(pieces, replicas[rank : rank + 1]) for rank, pieces in shards.items()]
        yield from (held for held in lists if held[0])


def pieces_of_rank(
    shape: ModelShape, optim: OptimSection, precision: str, layout: Layout, rank: int
) -> list[PieceMeta]:
    """The pieces of one global rank."""
    engine = _Partitions(_chunks(shape, layout), optim, precision, layout)
    stage, within = divmod(rank, layout.tensor * layout.data)
    data_rank, tensor_rank = divmod(within, layout.tensor)
    shards = engine.shards(stage, tensor_rank, range(data_rank, data_rank + 1))
    return engine.same(stage, None) + engine.same(stage, tensor_rank) + shards[data_rank]
