"""Bytes that a forward pass keeps for the backward pass, and what a step needs beyond them.

The structure is that of Korthikanti et al. 2022 (arXiv 2205.05198, sections 4.1 to 4.3): sums over
the inputs that each operator saves, some divided by tensor parallelism, some by sequence
parallelism, times the micro-batches that a pipeline stage has in flight. It differs from theirs in
what this project runs: no dropout masks, attention that does not keep the S x S scores, sequence
parallelism only for models with experts (``megatron_model.py``), and grouped queries, latent
attention, experts and prediction modules, which that paper does not have.

Two sets of constants. ``fused=False`` is the local layer spec, on CPU: what its operators save was
counted there, in fp32 and bf16, and a test compares the whole with real steps. It writes RMSNorm
and SwiGLU out (a copy more each of their input), and for heads of two widths (latent attention)
torch's attention falls back to one that keeps the scores. ``fused=True`` is Transformer Engine's
layers and fused kernels as these are known to work (Megatron-core 0.19.2, Transformer Engine 2.11);
**it has not been measured**. Nothing is recomputed in either: the engine has no such setting.

Routed tokens are taken as equally many for each expert-parallel rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from megatron_progressive.config import OptimSection, RunConfig
from megatron_progressive.cost.flops import muon_matrices
from megatron_progressive.cost.memory import BYTES, RankMemory, stage_memory
from megatron_progressive.models import TRANSFORMERS, tensor_table
from megatron_progressive.models.base import MOE, TransformerShape
from megatron_progressive.runtime.layout import Layout

_FP32 = 4
_BATCH = 1 << 24
"""Elements of a batch of Muon's tensors: EXCHANGE_NUMEL of ``optim/flat.py``, which has torch."""


@dataclass(frozen=True)
class Activations:
    """Bytes on a rank beyond parameters, gradients and optimizer state."""

    kept: int
    """For the backward pass, of all micro-batches in flight, when it begins."""
    temporary: int
    """Largest of what is needed for a moment beside them: gradients of the logits, tokens on
    their way to experts, gradients within a layer; or, if that is more than all of the above,
    what Newton-Schulz has beside the state, less ``kept``."""

    @property
    def total(self) -> int:
        return self.kept + self.temporary


@dataclass(frozen=True)
class RankPeak:
    """Most bytes that a rank holds during a step."""

    state: RankMemory
    activations: Activations

    @property
    def total(self) -> int:
        return self.state.total + self.activations.total


@dataclass(frozen=True)
class _Step:
    """What the sizes of one micro-batch on one rank depend on."""

    shape: TransformerShape
    layout: Layout
    samples: int
    width: int
    """Bytes of an element: 2 in bf16."""
    fused: bool

    @property
    def tokens(self) -> int:
        return self.samples * self.shape.sequence_length

    @property
    def rms_written_out(self) -> bool:
        """Whether norms are torch's RMSNorm, which is several operators."""
        return TRANSFORMERS[self.shape.family].norm == "RMSNorm" and not self.fused

    @property
    def sequence_ranks(self) -> int:
        """Ranks that divide what tensor parallelism alone leaves whole."""
        return self.layout.tensor if MOE in self.shape.layer_kinds() else 1

    def hidden(self, count: float = 1) -> float:
        """``count`` residual streams."""
        return count * self.tokens * self.shape.hidden_size * self.width / self.sequence_ranks

    def norm(self, width: int | None = None) -> float:
        """What a norm keeps beside its input: its output, which the linear behind it needs, its
        statistics, and unfused RMSNorm the output before the gain as well. That one computes in
        fp32 and in bf16 keeps its input so, in place of the one that it was given."""
        rms = TRANSFORMERS[self.shape.family].norm == "RMSNorm"
        each = 2 * _FP32 if self.rms_written_out else self.width
        statistics = _FP32 if rms else 2 * (_FP32 if self.fused else self.width)
        elements = width or self.shape.hidden_size
        return self.tokens * (elements * each + statistics) / self.sequence_ranks


def _scores(step: _Step) -> float:
    """Of the S x S scores of one self-attention, where it keeps them: in fp32."""
    shape, mla = step.shape, step.shape.mla
    if step.fused or mla is None or mla.qk_head_dim == mla.v_head_dim:
        return 0.0
    elements = step.tokens * shape.num_attention_heads * shape.sequence_length
    return elements * _FP32 / step.layout.tensor


def _attention(step: _Step) -> float:
    """Of one self-attention, from behind its norm to its residual addition."""
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
    """Elements a token of an MLP behind its input: both halves of a gated one, the activation,
    their product; unfused also the second half once more (Megatron-core adds an offset to it)."""
    gated = TRANSFORMERS[step.shape.family].gated
    return (3 if step.fused else 5) * width if gated else 2 * width


def _experts(step: _Step) -> tuple[float, float]:
    """Of the experts of a layer: bytes kept, and most bytes on their way beside them."""
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
    """Of one layer, ``dense`` or ``moe``: bytes kept, its input included, and most temporary
    bytes of its backward pass beside what it kept."""
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
    """Of the final norm, the head and the cross-entropy: bytes kept and temporary.

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
    """Of one prediction module: two norms, their joined output, a layer, the head again."""
    head = _head(step)[0]
    return step.hidden(4) + 2 * step.norm() + layer_bytes(step, kind)[0] + head


def in_flight(layout: Layout, stage: int, micro_batches: int) -> list[int]:
    """Micro-batches of each model chunk of a stage whose activations are held at the peak.

    1F1B holds as many as stages are left, itself included (Narayanan et al. 2021, arXiv
    2104.04473). The interleaved schedule runs 2 (P - stage - 1) + (v - 1) P forward passes of
    chunks before the first backward pass, and one more; P at a time of each chunk
    (``schedules.py`` of Megatron-core 0.19.2, ``get_pp_rank_microbatches``).
    """
    stages, chunks = layout.pipeline, layout.virtual_pipeline
    if chunks == 1:
        return [min(stages - stage, micro_batches)]
    passes = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    counts = [0] * chunks
    for number in range(min(passes, micro_batches * chunks)):
        counts[number // stages % chunks] += 1
    return counts


@lru_cache(maxsize=64)
def _muon_sizes(
    shape: TransformerShape, optim: OptimSection
) -> tuple[dict[tuple[int, int], int], int, int, int, int]:
    """Muon's matrices by size, and the elements of all its tensors and of the largest one, and of
    all and the largest of those that are several matrices in one (queries, keys and values)."""
    matrices: Counter[tuple[int, int]] = Counter()
    total = largest = joint = widest = 0
    for spec in tensor_table(shape).values():
        found = muon_matrices(spec, optim)
        matrices.update(found)
        if found:
            total, largest = total + spec.numel, max(largest, spec.numel)
            if spec.row_blocks:
                joint, widest = joint + spec.numel, max(widest, spec.numel)
    return matrices, total, largest, joint, widest


def _newton_schulz(shape: TransformerShape, config: RunConfig, layout: Layout, fused: bool) -> int:
    """Bytes of one batch of Muon's updates while matrices of one size are orthogonalised.

    A rank steps its tensors in batches (``optim/flat.py``). At the peak it has the batch's updates
    in fp32, copies of its parts of queries, keys and values, the matrices of one size in one
    tensor, and of them the iterate X; beside these two squares of the shorter side, or one and the
    next X, or in a narrower type X in fp32 (``optim/newton_schulz.py``). Tensor-parallel ranks
    have the updates three times: their shards, the shards that were gathered, and the whole
    tensors. Each has a part of the matrices then.
    """
    matrices, total, largest, joint, widest = _muon_sizes(shape, config.optim)
    ranks = layout.world if layout.zero_stage else layout.tensor * layout.pipeline
    batch = max(largest, min(_BATCH // layout.tensor, total // ranks))
    dtype = config.optim.ns_dtype or ("fp16" if fused else "fp32")
    most = 0
    for (n_out, n_in), count in matrices.items():
        count = max(1, min(-(-count // layout.tensor), batch // (n_out * n_in)))
        stacked, squares = count * n_out * n_in, count * min(n_out, n_in) ** 2
        width = _FP32 if dtype == "fp32" else 2
        beside = max(width * 2 * squares, width * (squares + stacked))
        if width < _FP32:
            beside = max(beside, _FP32 * stacked)
        most = max(most, (_FP32 + width) * stacked + beside)
    updates = (3 if layout.tensor > 1 else 1) * batch
    parts = max(widest, min(joint // layout.tensor, batch))
    return _FP32 * (updates + parts) + most if total else 0


def stage_activations(
    shape: TransformerShape, config: RunConfig, layout: Layout, *, fused: bool
) -> list[Activations]:
    """Activations and temporary bytes of a rank of each pipeline stage (experts balanced)."""
    train = config.train
    step = _Step(shape, layout, train.micro_batch, BYTES[train.precision], fused)
    batches = max(1, train.global_batch // (train.micro_batch * layout.data))
    kinds = shape.layer_kinds()
    layers = {kind: layer_bytes(step, kind) for kind in set(kinds)}
    head, loss = _head(step)
    newton_schulz = _newton_schulz(shape, config, layout, fused)
    found = []
    for stage, chunks in enumerate(layout.chunk_layers(shape.num_layers)):
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
    """State and activations of the rank that holds most of both together."""
    activations = stage_activations(shape, config, layout, fused=fused)
    states = stage_memory(shape, config, layout)
    peaks = [RankPeak(s, a) for s, a in zip(states, activations, strict=True)]
    return max(peaks, key=lambda peak: peak.total)
