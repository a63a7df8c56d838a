"""Bytes that a forward pass keeps for the backward pass, and what a step needs beyond them.

The structure is that of Korthikanti et al. 2022 (arXiv 2205.05198, sections 4.1 to 4.3): sums over
the inputs that each operator saves, some divided by tensor parallelism, some by sequence
parallelism, times the micro-batches that a pipeline stage has in flight. It differs from theirs
because this project runs other things: no dropout masks, attention that does not keep the S x S
scores, sequence parallelism only for models with experts (``engines/megatron/model.py``), and
grouped queries, latent attention, experts and prediction modules, which that paper does not have.

There are two sets of constants. ``fused=False`` is the local layer spec, on CPU: what its operators
save was counted there, in fp32 and bf16, and a test compares the whole with real steps. This spec
writes RMSNorm and SwiGLU out (each keeps one more copy of its input), and for heads of two widths
(latent attention) torch's attention falls back to one that keeps the scores. ``fused=True`` is
Transformer Engine's layers and fused kernels as these are known to work (Megatron-core 0.19.2,
Transformer Engine 2.11); **it has not been measured**. Nothing is recomputed in either set, since
the engine has no such setting.

Each expert-parallel rank is taken to get equally many routed tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from megatron_progressive.config import OptimSection, RunConfig
from megatron_progressive.cost.flops import muon_matrices
from megatron_progressive.cost.memory import BYTES, RankMemory, stage_memory
from megatron_progressive.models import TRANSFORMERS, tensor_table
from megatron_progressive.models.base import MOE, TransformerShape, layer_number
from megatron_progressive.runtime.layout import Layout

_FP32 = 4
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


@dataclass(frozen=True)
class _Step:
    """The quantities on which the sizes of one micro-batch on one rank depend."""

    shape: TransformerShape
    layout: Layout
    samples: int
    width: int
    """The number of bytes of an element, which is 2 in bf16."""
    fused: bool

    @property
    def tokens(self) -> int:
        return self.samples * self.shape.sequence_length

    @property
    def rms_written_out(self) -> bool:
        """Whether norms are torch's RMSNorm, which consists of several operators."""
        return TRANSFORMERS[self.shape.family].norm == "RMSNorm" and not self.fused

    @property
    def sequence_ranks(self) -> int:
        """The number of ranks that divide what tensor parallelism alone leaves whole."""
        return self.layout.tensor if MOE in self.shape.layer_kinds() else 1

    def hidden(self, count: float = 1) -> float:
        """The bytes of ``count`` residual streams."""
        return count * self.tokens * self.shape.hidden_size * self.width / self.sequence_ranks

    def norm(self, width: int | None = None) -> float:
        """The bytes that a norm keeps beside its input: its output, which the linear behind it
        needs, its statistics and, for unfused RMSNorm, the output before the gain. Unfused RMSNorm
        computes in fp32, and in bf16 keeps its input in fp32 in place of the one that it was
        given."""
        rms = TRANSFORMERS[self.shape.family].norm == "RMSNorm"
        each = 2 * _FP32 if self.rms_written_out else self.width
        statistics = _FP32 if rms else 2 * (_FP32 if self.fused else self.width)
        elements = width or self.shape.hidden_size
        return self.tokens * (elements * each + statistics) / self.sequence_ranks


def _scores(step: _Step) -> float:
    """The bytes of the S x S scores of one self-attention, in fp32, where it keeps them."""
    shape, mla = step.shape, step.shape.mla
    if step.fused or mla is None or mla.qk_head_dim == mla.v_head_dim:
        return 0.0
    elements = step.tokens * shape.num_attention_heads * shape.sequence_length
    return elements * _FP32 / step.layout.tensor


def _attention(step: _Step) -> float:
    """The bytes that one self-attention keeps, from behind its norm to its residual addition."""
    shape, w = step.shape, step.width
    heads, mla = shape.num_attention_heads, shape.mla
    whole, cut = 0.0, 0.0  # bytes a token
    fixed = 0.0
    if mla is not None:
        queries = heads * mla.qk_head_dim
        # rotated and joined queries and keys, values, output, statistics of the softmax
        cut += w * (2 * queries + 2 * heads * mla.v_head_dim) + _FP32 * heads
        ranks = [mla.kv_lora_rank, *([mla.q_lora_rank] if mla.q_lora_rank else [])]
        whole += w * (sum(ranks) + mla.qk_rope_head_dim)
        fixed += sum(step.norm(rank) for rank in ranks)
        rotary = mla.qk_rope_head_dim
        if scores := _scores(step):
            fixed += scores
            # no statistics; in bf16 queries, keys and values as they were copied to fp32
            cut -= _FP32 * heads
            cut += (_FP32 - w) * (2 * queries + heads * mla.v_head_dim)
    else:
        queries, keys = heads * shape.head_dim, shape.num_query_groups * shape.head_dim
        cut += w * (queries + 2 * keys) + w * queries + _FP32 * heads
        rotary = shape.head_dim if shape.rope is not None else 0
        if rotary:  # rotated copies; the values stay where the projection wrote them
            cut += w * (queries + keys)
        if TRANSFORMERS[shape.family].qk_norm:
            # unfused the output before the gain, and in bf16 the input in fp32; fused the output
            each = w if step.fused or w == _FP32 else 2 * _FP32
            cut += each * (queries + keys) + _FP32 * (heads + shape.num_query_groups)
    if not step.fused:  # cosines and sines, of queries and of keys, for each position
        fixed += 4 * shape.sequence_length * rotary * w
    return fixed + step.tokens * (whole / step.sequence_ranks + cut / step.layout.tensor)


def _mlp_elements(step: _Step, width: int) -> float:
    """The elements per token of an MLP behind its input: both halves of a gated one, the activation
    and their product. Unfused, the second half counts twice, since Megatron-core adds an offset to
    it."""
    gated = TRANSFORMERS[step.shape.family].gated
    return (3 if step.fused else 5) * width if gated else 2 * width


def _experts(step: _Step) -> tuple[float, float]:
    """The bytes that the experts of a layer keep, and the most bytes that are on their way beside
    them."""
    moe, layout, w = step.shape.moe, step.layout, step.width
    assert moe is not None
    tokens = step.tokens / step.sequence_ranks
    rows = tokens * moe.top_k * layout.expert_tensor
    # their input; unfused one more product: with the router's probability
    elements = _mlp_elements(step, moe.ffn_hidden_size) + (0 if step.fused else moe.ffn_hidden_size)
    kept = rows * w * (step.shape.hidden_size + elements / layout.expert_tensor)
    kept += tokens * 4 * _FP32 * moe.num_experts  # logits, scores, probabilities, choice
    shared = moe.shared_experts * moe.ffn_hidden_size
    kept += step.tokens * w * _mlp_elements(step, shared) / layout.tensor
    # what came from the experts, twice in their order and once in the tokens'; in fp32 when unfused
    return kept, 3 * rows * (w if step.fused else _FP32) * step.shape.hidden_size


def layer_bytes(step: _Step, kind: str) -> tuple[float, float]:
    """The bytes that one layer, ``dense`` or ``moe``, keeps including its input, and the most
    temporary bytes of its backward pass beside these."""
    shape = step.shape
    if kind == MOE:
        mlp, inside = _experts(step)
    else:
        elements = step.tokens * step.width / step.layout.tensor
        mlp = elements * _mlp_elements(step, shape.ffn_hidden_size)
        inside = elements * 2 * shape.ffn_hidden_size  # gradients of both halves, or of in and out
    # the gradients of kept scores come when what the MLP and its norm kept is gone
    inside = max(inside, 2 * _scores(step) - mlp - step.norm())
    return step.hidden(2) + 2 * step.norm() + _attention(step) + mlp, step.hidden(2) + inside


def _head(step: _Step) -> tuple[float, float]:
    """The bytes that the final norm, the head and the cross-entropy keep, and their temporary
    bytes.

    The vocabulary-parallel cross-entropy keeps exponentials in fp32. In bf16 the logits, and then
    their gradient, are beside them; where there is padding, its mask makes a copy.
    """
    shape, t = step.shape, step.layout.tensor
    logits = step.tokens * shape.padded_vocab_size / t
    weight = shape.padded_vocab_size * shape.hidden_size / t
    beside = step.width < _FP32 or shape.vocab_size < shape.padded_vocab_size
    kept = step.hidden() + step.norm() + logits * _FP32
    return kept, max(beside * logits * step.width, weight * step.width + step.hidden())


def _prediction(step: _Step, kind: str) -> float:
    """The bytes of one prediction module: two norms, their joined output, a layer, and the head
    again."""
    head = _head(step)[0]
    return step.hidden(4) + 2 * step.norm() + layer_bytes(step, kind)[0] + head


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
        width = _FP32 if dtype == "fp32" else 2
        beside = max(width * 2 * squares, width * (squares + stacked))
        if width < _FP32:
            beside = max(beside, _FP32 * stacked)
        most = max(most, (_FP32 + width) * stacked + beside)
    shards = -(-batch // tensor) if found.largest > _BATCH else batch
    updates = 2 * batch + shards if tensor > 1 else batch
    parts = max(found.widest, min(found.joint // tensor, batch))
    return _FP32 * (updates + parts) + most


def stage_activations(
    shape: TransformerShape, config: RunConfig, layout: Layout, *, fused: bool
) -> list[Activations]:
    """The activations and temporary bytes of a rank of each pipeline stage, with balanced
    experts."""
    train = config.train
    step = _Step(shape, layout, train.micro_batch, BYTES[train.precision], fused)
    batches = max(1, train.global_batch // (train.micro_batch * layout.data))
    kinds = shape.layer_kinds()
    layers = {kind: layer_bytes(step, kind) for kind in set(kinds)}
    head, loss = _head(step)
    muon = _muon_of_stages(shape, config.optim, layout)
    found = []
    for stage, (chunks, muons) in enumerate(
        zip(layout.chunk_layers(shape.num_layers), muon, strict=True)
    ):
        newton_schulz = _newton_schulz(muons, config, layout, fused)
        counts = in_flight(layout, stage, batches)
        last = stage == layout.pipeline - 1
        kept = sum(
            count * layers[kinds[number]][0]
            for count, numbers in zip(counts, chunks, strict=True)
            for number in numbers
        )
        if stage == 0 and step.rms_written_out and step.width < _FP32:
            kept += step.hidden()  # the embedding's output, of which norms keep a copy
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
                temporary = max(temporary, layers[kinds[-1]][1] - gone)
                gone += shape.mtp_depth * _prediction(step, kinds[-1])
            kept += gone
        for number in reversed([number for numbers in chunks for number in numbers]):
            layer, inside = layers[kinds[number]]
            temporary = max(temporary, inside - gone)
            gone += layer
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
