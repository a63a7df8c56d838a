"""Which rank holds which pieces, from the layout alone.

These are the same pieces as in the engines' ``state()`` (a test compares them), found without
processes, torch or Megatron-core, since planning looks at thousands of ranks. From Megatron-core
0.19.2 this module takes the order of ranks (``parallel_state``: tensor fastest, then context, then
data, then pipeline; for experts expert-tensor fastest, then expert, then expert-data), which
tensors a stage has a copy of, and how its distributed optimizer cuts a buffer; and from DeepSpeed
0.19.8 how ZeRO cuts parameters (``stage_1_and_2.py``, ``bf16_optimizer.py``,
``partition_parameters.py``). The order in which parameters are registered is the table's, which is
the local layer spec's.
Transformer Engine's spec registers norms after other linears, and experts by linear, which moves
the cuts of the distributed optimizer; it also keeps latent attention's down-projections whole on
every tensor-parallel rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_progressive.config import OptimSection
from megatron_progressive.engines.buffer_places import zero_3_places, zero_places
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import (
    ModelShape,
    TensorSpec,
    TransformerShape,
    layer_number,
)
from megatron_progressive.optim.owners import BufferTensor, Place, bucket_numel, owner_places
from megatron_progressive.optim.rules import ADAMW, STATE_SLOTS, STEP, rule_of
from megatron_progressive.reshard.boxes import (
    MASTER,
    PARAM,
    Box,
    PieceMeta,
    flat_range_boxes,
    whole,
)
from megatron_progressive.runtime.layout import Layout

Held = tuple[list[PieceMeta], Sequence[int]]
"""Some pieces, and the global ranks each of which holds all of them."""

_WEIGHT_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_STATE_DTYPE = "float32"

FINAL_NORM = "decoder.final_layernorm."


@dataclass(frozen=True)
class HeldTensor:
    """One tensor of one model chunk."""

    name: str
    spec: TensorSpec
    tied_copy: bool = False
    """Whether it is a later stage's copy of the embedding."""
    alone: bool = False
    """Whether it is the embedding of which the first and the last stage each have a copy. Such a
    tensor has a bucket of the distributed optimizer to itself, or lies first in one
    (:func:`shared_embedding_is_whole`)."""


def chunk_tensors(shape: ModelShape, layout: Layout) -> list[list[list[HeldTensor]]]:
    """The tensors of each model chunk of each stage, as Megatron-core registers them.

    Embedding and positions are on the first stage; final norm, multi-token prediction and head are
    on the last. With multi-token prediction the final norm is where the last layer is. The last
    stage has a copy of the embedding where the head is tied to it, and where there is multi-token
    prediction. Models that can only be data parallel have one chunk.
    """
    if not isinstance(shape, TransformerShape):
        return [[[HeldTensor(name, spec) for name, spec in tensor_table(shape).items()]]]
    first: list[HeldTensor] = []
    layers: dict[int, list[HeldTensor]] = {number: [] for number in range(shape.num_layers)}
    last: list[HeldTensor] = []
    predicts = bool(shape.mtp_depth)
    shared = layout.pipeline > 1 and (shape.tie_embeddings or predicts)
    copies_before: list[HeldTensor] = []
    copies_behind: list[HeldTensor] = []
    for name, spec in tensor_table(shape).items():
        number = layer_number(name)
        if number is not None:
            layers[number].append(HeldTensor(name, spec))
        elif spec.role == "embedding":
            first.append(HeldTensor(name, spec, alone=shared))
            if shared:
                copy = [HeldTensor(name, spec, tied_copy=True, alone=True)]
                # that of multi-token prediction is the model's embedding, else it is the head
                copies_before, copies_behind = (copy, []) if predicts else ([], copy)
        elif spec.role == "position":
            first.append(HeldTensor(name, spec))
        elif predicts and name.startswith(FINAL_NORM):
            layers[shape.num_layers - 1].append(HeldTensor(name, spec))
        else:
            last.append(HeldTensor(name, spec))
    chunks = [
        [[t for number in numbers for t in layers[number]] for numbers in stage]
        for stage in layout.chunk_layers(shape.num_layers)
    ]
    chunks[0][0][:0] = first
    chunks[-1][-1][:0] = copies_before
    chunks[-1][-1] += last + copies_behind
    return chunks


def shared_embedding_is_whole(shape: ModelShape, layout: Layout, optim: OptimSection) -> bool:
    """Whether under Muon-NSGD one data-parallel rank owns the whole embedding of which the first
    and the last stage have copies. That is so where it fits into a rank's share of the buffer on
    both stages."""
    chunks = chunk_tensors(shape, layout)
    for chunk in (chunks[0][0], chunks[-1][-1]):
        dense = [
            tensor
            for tensor in chunk
            if tensor.spec.trainable
            and not (layout.separate_experts and tensor.spec.expert is not None)
        ]
        numels = [_local_box(tensor.spec, 0, layout.tensor).numel for tensor in dense]
        for tensor, numel in zip(dense, numels, strict=True):
            adamw = rule_of(tensor.spec, optim) == ADAMW
            if tensor.alone and (adamw or numel * layout.replicas > sum(numels)):
                return False
    return True


def _local_box(spec: TensorSpec, tensor_rank: int, tensor_ranks: int) -> Box:
    """The box of a tensor with which a tensor-parallel rank computes."""
    if spec.tp_axis is None:
        return whole(spec.shape)
    shape, offset = list(spec.shape), [0] * len(spec.shape)
    shape[spec.tp_axis] //= tensor_ranks
    offset[spec.tp_axis] = shape[spec.tp_axis] * tensor_rank
    return Box(tuple(offset), tuple(shape))


def _state_pieces(
    tensor: HeldTensor, boxes: list[Box], optim: OptimSection, precision: str
) -> Iterator[PieceMeta]:
    """The pieces that the optimizer keeps of ``boxes`` of a tensor: its slots and, in bf16, the
    fp32 weights."""
    rule, readable = rule_of(tensor.spec, optim), not tensor.tied_copy
    for slot in (*((MASTER,) if precision == "bf16" else ()), *STATE_SLOTS[rule]):
        for box in boxes:
            yield PieceMeta((tensor.name, slot), box, _STATE_DTYPE, readable)
    if rule == ADAMW:
        yield PieceMeta((tensor.name, STEP), whole((1,)), _STATE_DTYPE, readable)


@dataclass(frozen=True)
class _Part:
    """The tensors of one stage that the same parallel groups divide: all of them, all but the
    experts, or the experts of one expert-parallel rank."""

    chunks: list[list[HeldTensor]]
    ranks: range
    """The first of the global ranks that hold the same part, by tensor-parallel rank."""
    stride: int
    """The distance between two consecutive ranks that hold the same part."""
    data: int
    """The number of ranks that hold the same part."""
    optim: OptimSection
    precision: str
    layout: Layout
    whole_embedding: bool
    """The answer of :func:`shared_embedding_is_whole`."""

    @property
    def state_sharded(self) -> bool:
        """Whether the optimizer state, including master weights, is divided over data-parallel
        ranks."""
        return self.layout.zero_stage >= 1

    @property
    def weights_sharded(self) -> bool:
        return self.layout.engine == "deepspeed" and self.layout.zero_stage == 3

    def replicas(self, tensor_rank: int) -> range:
        """The global ranks that hold the same part of each tensor."""
        first = self.ranks[tensor_rank]
        return range(first, first + self.stride * self.data, self.stride)

    def same(self, tensor_rank: int | None) -> list[PieceMeta]:
        """The pieces that all data-parallel ranks hold, of the tensors that tensor parallelism
        cuts. With None these are the pieces of the other tensors, which all tensor-parallel ranks
        hold as well."""
        pieces = []
        for tensor in (tensor for chunk in self.chunks for tensor in chunk):
            if (tensor.spec.tp_axis is None) != (tensor_rank is None):
                continue
            box = _local_box(tensor.spec, tensor_rank or 0, len(self.ranks))
            if not tensor.spec.trainable:
                pieces.append(PieceMeta((tensor.name, PARAM), box, _STATE_DTYPE))
                continue
            if not self.weights_sharded:
                pieces.append(self._weight(tensor, box))
            if not self.state_sharded:
                pieces.extend(_state_pieces(tensor, [box], self.optim, self.precision))
        return pieces

    def shards(self, tensor_rank: int, data_ranks: range) -> dict[int, list[PieceMeta]]:
        """The pieces that each of some data-parallel ranks holds alone."""
        pieces: dict[int, list[PieceMeta]] = {data_rank: [] for data_rank in data_ranks}
        for chunk in self.chunks if self.state_sharded else []:
            tensors = [tensor for tensor in chunk if tensor.spec.trainable]
            boxes = [_local_box(t.spec, tensor_rank, len(self.ranks)) for t in tensors]
            for tensor, box, place in zip(
                tensors, boxes, self._places(tensors, boxes), strict=True
            ):
                owners = place.ranks()
                for owner in range(
                    max(owners.start, data_ranks.start), min(owners.stop, data_ranks.stop)
                ):
                    parts = [part for part, _, _ in flat_range_boxes(box, *place.owned(owner))]
                    if self.weights_sharded:
                        pieces[owner].extend(self._weight(tensor, part) for part in parts)
                    pieces[owner].extend(_state_pieces(tensor, parts, self.optim, self.precision))
        return pieces

    def _places(self, chunk: list[HeldTensor], boxes: list[Box]) -> list[Place]:
        numels = [box.numel for box in boxes]
        if self.weights_sharded:
            return zero_3_places(numels, self.data)
        if self.layout.engine == "deepspeed":
            return zero_places(numels, self.data)
        tensors = [
            BufferTensor(
                t.name,
                numel,
                rule_of(t.spec, self.optim),
                alone=t.alone and not self.whole_embedding,
                first=t.alone and self.whole_embedding,
            )
            for t, numel in zip(chunk, numels, strict=True)
        ]
        return owner_places(tensors, self.data, bucket_numel(self.layout.replicas))

    def _weight(self, tensor: HeldTensor, box: Box) -> PieceMeta:
        dtype = _WEIGHT_DTYPES[self.precision]
        return PieceMeta((tensor.name, PARAM), box, dtype, not tensor.tied_copy)


def _by_expert_rank(
    chunks: list[list[HeldTensor]], experts_each: int
) -> dict[int | None, list[list[HeldTensor]]]:
    """The chunks with nothing but the experts of each expert-parallel rank; for None, with
    everything else."""
    found: dict[int | None, list[list[HeldTensor]]] = defaultdict(lambda: [[] for _ in chunks])
    for number, chunk in enumerate(chunks):
        for tensor in chunk:
            expert = tensor.spec.expert
            found[None if expert is None else expert // experts_each][number].append(tensor)
    return found


def _parts(
    shape: ModelShape, optim: OptimSection, precision: str, layout: Layout
) -> Iterator[_Part]:
    """The parts of every stage."""
    moe = shape.moe if isinstance(shape, TransformerShape) else None
    experts = moe.num_experts if moe is not None else layout.expert
    separate, ranks = layout.separate_experts, layout.expert_tensor
    embedding = shared_embedding_is_whole(shape, layout, optim)
    for stage, chunks in enumerate(chunk_tensors(shape, layout)):
        first = stage * layout.tensor * layout.replicas
        divided = _by_expert_rank(chunks, experts // layout.expert) if separate else {}
        yield _Part(
            divided[None] if separate else chunks, range(first, first + layout.tensor),
            layout.tensor, layout.replicas, optim, precision, layout, embedding,
        )  # fmt: skip
        for expert_rank in range(layout.expert if separate else 0):
            begin = first + ranks * expert_rank
            yield _Part(
                divided[expert_rank], range(begin, begin + ranks), ranks * layout.expert,
                layout.expert_data, optim, precision, layout, embedding,
            )  # fmt: skip


def held_pieces(
    shape: ModelShape, optim: OptimSection, precision: str, layout: Layout
) -> Iterator[Held]:
    """All pieces of all ranks, as lists and the ranks that hold each list.

    The pieces of a rank are the union of the lists in which it appears. As a multiset they equal
    the ``meta`` of the pieces in its engine's ``state()``.
    """
    for part in _parts(shape, optim, precision, layout):
        everyone = sorted(rank for first in range(len(part.ranks)) for rank in part.replicas(first))
        lists: list[Held] = [(part.same(None), everyone)]
        for tensor_rank in range(len(part.ranks)):
            replicas = part.replicas(tensor_rank)
            lists.append((part.same(tensor_rank), replicas))
            shards = part.shards(tensor_rank, range(part.data))
            lists += [(pieces, replicas[rank : rank + 1]) for rank, pieces in shards.items()]
        yield from (held for held in lists if held[0])


def pieces_of_rank(
    shape: ModelShape, optim: OptimSection, precision: str, layout: Layout, rank: int
) -> list[PieceMeta]:
    """The pieces of one global rank."""
    pieces: list[PieceMeta] = []
    for part in _parts(shape, optim, precision, layout):
        for tensor_rank in range(len(part.ranks)):
            replicas = part.replicas(tensor_rank)
            if rank in replicas:
                data_rank = replicas.index(rank)
                shards = part.shards(tensor_rank, range(data_rank, data_rank + 1))
                pieces += part.same(None) + part.same(tensor_rank) + shards[data_rank]
    return pieces
