"""Bytes that a forward pass keeps for the backward pass, and what a step needs beyond them.

The structure is that of Korthikanti et al. 2022 (arXiv 2205.05198, sections 4.1 to 4.3): sums over
the inputs that each operator saves, some divided by tensor parallelism, some by sequence
parallelism, times the micro-batches that a pipeline stage has in flight. It differs from theirs
because this project runs other things: no dropout masks, attention that does not keep the S x S
scores, and grouped queries, latent attention, experts and prediction modules, which that paper does
not have.

There are two sets of constants. ``fused=False`` is the local layer spec, on CPU: what its operators
save was counted there, in fp32 and bf16, and a test compares the whole with real steps. This spec
writes RMSNorm and SwiGLU out (each keeps one more copy of its input), and for heads of two widths
(latent attention) torch's attention falls back to one that keeps the scores. ``fused=True`` is
Transformer Engine's layers and fused kernels as these are known to work (Megatron-core 0.19.2,
Transformer Engine 2.11); **it has not been measured**.

A layer that is computed anew keeps its input; a part of it that is keeps what goes into the part
(``parallel.recompute``). While the backward pass is in it, what was computed anew is there as well.

Each expert-parallel rank is taken to get equally many routed tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from megatron_progressive.config import OptimSection, RunConfig
from megatron_progressive.cost.flops import muon_matrices
from megatron_progressive.cost.layer_activations import (
    FP32,
    Step,
    head_bytes,
    layer_bytes,
    prediction_bytes,
)
from megatron_progressive.cost.memory import BYTES, RankMemory, stage_memory
from megatron_progressive.cost.recompute import whole_layers
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import TransformerShape, layer_number
from megatron_progressive.runtime.layout import Layout

_BATCH = 1 << 24
"""How many elements of Muon's tensors make a batch: the number EXCHANGE_NUMEL of ``optim/flat.py``,
which needs torch."""


@dataclass(frozen=True)
class Activations:
    """The bytes on a rank beyond parameters, gradients and optimizer state."""

    kept: int
    """Bytes kept for the backward pass when that begins, over all micro-batches in flight."""
    temporary: int
    """The largest number of bytes that are needed for a moment beside those: gradients of the
    logits, tokens on their way to experts, or gradients within a layer. Where Newton-Schulz has
    more beside the state than all of this, it is that number less ``kept``."""

    @property
    def total(self) -> int:
        return self.kept + self.temporary


@dataclass(frozen=True)
class RankPeak:
    """The most bytes that a rank holds during a step."""

    state: RankMemory
    activations: Activations

    @property
    def total(self) -> int:
        return self.state.total + self.activations.total


def in_flight(layout: Layout, stage: int, micro_batches: int) -> list[int]:
    """The number of micro-batches of each model chunk of a stage whose activations are held at the
    peak.

    The 1F1B schedule holds as many as there are stages left, including this one (Narayanan et al.
    2021, arXiv 2104.04473). The interleaved schedule runs 2 (P - stage - 1) + (v - 1) P + 1 forward
    passes of chunks before the first backward pass, P at a time of each chunk (``schedules.py`` of
    Megatron-core 0.19.2, ``get_pp_rank_microbatches``).
    """
    stages, chunks = layout.pipeline, layout.virtual_pipeline
    if chunks == 1:
        return [min(stages - stage, micro_batches)]
    passes = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    counts = [0] * chunks
    for number in range(min(passes, micro_batches * chunks)):
        counts[number // stages % chunks] += 1
    return counts


@dataclass
class _Muon:
    """What Muon orthogonalises of some tensors."""

    matrices: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Matrices by size."""
    total: int = 0
    """The elements of all tensors."""
    largest: int = 0
    """Those of the largest one."""
    joint: int = 0
    """Those of the tensors that are several matrices in one (queries, keys and values)."""
    widest: int = 0
    """Those of the largest of these."""

    def add(self, other: _Muon, times: int = 1) -> None:
        for size, count in other.matrices.items():
            self.matrices[size] += times * count
        self.total += times * other.total
        self.joint += times * other.joint
        if times:
            self.largest = max(self.largest, other.largest)
            self.widest = max(self.widest, other.widest)


_EMBEDDING, _HEAD = "embedding", "head"


@lru_cache(maxsize=64)
def _muon_parts(shape: TransformerShape, optim: OptimSection) -> dict[str, _Muon]:
    """Muon's matrices of the embedding, of one layer of each kind, and of the head with what else
    is behind the layers."""
    kinds = shape.layer_kinds()
    first = {kinds.index(kind) for kind in set(kinds)}
    parts = {name: _Muon() for name in (_EMBEDDING, _HEAD, *kinds)}
    for name, spec in tensor_table(shape).items():
        found, number = muon_matrices(spec, optim), layer_number(name)
        if not found or (number is not None and number not in first):
            continue
        before = spec.role in ("embedding", "position")
        place = kinds[number] if number is not None else _EMBEDDING if before else _HEAD
        blocks = spec.numel if spec.row_blocks else 0
        parts[place].add(_Muon(Counter(found), spec.numel, spec.numel, blocks, blocks))
    return parts


def _muon_of_stages(
    shape: TransformerShape, optim: OptimSection, layout: Layout
) -> Iterator[_Muon]:
    """What each pipeline stage orthogonalises. Of an embedding that the last stage has a copy of
    the first has the update, but for ZeRO stage 0."""
    parts, kinds = _muon_parts(shape, optim), shape.layer_kinds()
    shared = layout.pipeline > 1 and (shape.tie_embeddings or bool(shape.mtp_depth))
    for stage, chunks in enumerate(layout.chunk_layers(shape.num_layers)):
        found, last = _Muon(), stage == layout.pipeline - 1
        found.add(parts[_EMBEDDING], stage == 0 or (last and shared and layout.zero_stage == 0))
        for kind, count in Counter(kinds[n] for numbers in chunks for n in numbers).items():
            found.add(parts[kind], count)
        found.add(parts[_HEAD], last)
        yield found


def _newton_schulz(found: _Muon, config: RunConfig, layout: Layout, fused: bool) -> int:
    """The bytes of one batch of Muon's updates while matrices of one size are orthogonalised, on a
    rank of a stage.

    A rank steps its tensors in batches (``optim/flat.py``). At the peak it holds the batch's
    updates in fp32, copies of its parts of queries, keys and values, the matrices of one size in
    one tensor, and their iterate X. Beside these it holds two squares of the shorter side, or one
    square and the next X, or, in a narrower type, X in fp32 (``optim/newton_schulz.py``).
    Tensor-parallel ranks have the updates three times: as their shards, as the shards that were
    gathered, and as whole tensors. Each rank then has a part of the matrices; of a tensor that is a
    batch of its own one rank has the whole, and the others only their shards.
    """
    if not found.total:
        return 0
    tensor = layout.tensor
    ranks = layout.world // layout.pipeline if layout.zero_stage else tensor
    batch = max(found.largest, min(_BATCH // tensor, found.total // ranks))
    dtype = config.optim.ns_dtype or ("fp16" if fused else "fp32")
    most = 0
    for (n_out, n_in), count in found.matrices.items():
        count = max(1, min(-(-count // tensor), batch // (n_out * n_in)))
        stacked, squares = count * n_out * n_in, count * min(n_out, n_in) ** 2
        width = FP32 if dtype == "fp32" else 2
        beside = max(width * 2 * squares, width * (squares + stacked))
        if width < FP32:
            beside = max(beside, FP32 * stacked)
        most = max(most, (FP32 + width) * stacked + beside)
    shards = -(-batch // tensor) if found.largest > _BATCH else batch
    updates = 2 * batch + shards if tensor > 1 else batch
    parts = max(found.widest, min(found.joint // tensor, batch))
    return FP32 * (updates + parts) + most


def stage_activations(
    shape: TransformerShape, config: RunConfig, layout: Layout, *, fused: bool
) -> list[Activations]:
    """The activations and temporary bytes of a rank of each pipeline stage, with balanced
    experts."""
    train = config.train
    step = Step(shape, layout, train.micro_batch, BYTES[train.precision], fused)
    batches = max(1, train.global_batch // (train.micro_batch * layout.data))
    kinds = shape.layer_kinds()
    layers = {
        (kind, whole): layer_bytes(step, kind, whole=whole)
        for kind in set(kinds)
        for whole in (False, True)
    }
    head, loss = head_bytes(step)
    muon = _muon_of_stages(shape, config.optim, layout)
    found = []
    for stage, (chunks, muons) in enumerate(
        zip(layout.chunk_layers(shape.num_layers), muon, strict=True)
    ):
        newton_schulz = _newton_schulz(muons, config, layout, fused)
        counts = in_flight(layout, stage, batches)
        last = stage == layout.pipeline - 1
        kept = sum(
            count * layers[kinds[number], whole].kept
            for count, numbers in zip(counts, chunks, strict=True)
            for number, whole in whole_layers(layout, numbers)
        )
        if stage == 0 and step.rms_written_out and step.width < FP32:
            kept += step.hidden()  # the embedding's output, of which norms keep a copy
        kept += step.mask()
        if not last and not fused:  # outputs that were sent on; on CUDA they are released
            kept += sum(counts) * step.hidden()
        # sequence parallelism gathers the whole input of each linear into one buffer, which stays,
        # and has that input's whole gradient for a moment
        gathered = 2 * step.hidden(step.sequence_ranks) if step.sequence_ranks > 1 else 0.0
        # the backward pass: what it has gone through is gone
        temporary = gone = 0.0
        if last:
            temporary, gone = loss, head
            if shape.mtp_depth and kinds:
                # Megatron-core computes prediction modules anew with all layers or not at all
                whole = layout.recompute == "full" and layout.recompute_layers is None
                temporary = max(temporary, layers[kinds[-1], whole].inside - gone)
                gone += shape.mtp_depth * prediction_bytes(step, kinds[-1], whole)
            kept += gone
        in_order = [one for numbers in chunks for one in whole_layers(layout, numbers)]
        for number, whole in reversed(in_order):
            layer = layers[kinds[number], whole]
            temporary = max(temporary, layer.inside - gone)
            gone += layer.kept
        temporary += gathered
        if kept + temporary < newton_schulz:
            found.append(Activations(int(kept), int(newton_schulz - kept)))
        else:
            found.append(Activations(int(kept), int(temporary)))
    return found


def fullest_rank(
    shape: TransformerShape, config: RunConfig, layout: Layout, *, fused: bool
) -> RankPeak:
    """The state and the activations of the rank that holds most of both together."""
    activations = stage_activations(shape, config, layout, fused=fused)
    states = stage_memory(shape, config, layout)
    peaks = [RankPeak(s, a) for s, a in zip(states, activations, strict=True)]
    return max(peaks, key=lambda peak: peak.total)
