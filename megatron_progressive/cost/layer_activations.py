"""Bytes that one layer keeps for the backward pass, and needs for a moment in it.

``cost/activations.py`` says what is counted and from where it is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_progressive.models import TRANSFORMERS
from megatron_progressive.models.base import MOE, TransformerShape
from megatron_progressive.runtime.layout import Layout

FP32 = 4


@dataclass(frozen=True)
class Step:
    """The quantities on which the sizes of one micro-batch on one rank depend."""

    shape: TransformerShape
    layout: Layout
    samples: int
    width: int
    """The number of bytes of an element, which is 2 in bf16."""
    fused: bool

    @property
    def length(self) -> int:
        """The number of tokens of one sample on this rank."""
        return self.shape.sequence_length // self.layout.context

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def gathers(self) -> bool:
        """Whether attention gathers the keys and values of all context-parallel ranks; Transformer
        Engine's passes them on from rank to rank."""
        return self.layout.context > 1 and not self.fused

    def mask(self) -> float:
        """The bytes of the mask that such attention has, one for all layers."""
        return self.length * self.shape.sequence_length * self.width if self.gathers else 0.0

    @property
    def rms_written_out(self) -> bool:
        """Whether norms are torch's RMSNorm, which consists of several operators."""
        return TRANSFORMERS[self.shape.family].norm == "RMSNorm" and not self.fused

    @property
    def sequence_ranks(self) -> int:
        """The number of ranks that divide what tensor parallelism alone leaves whole."""
        divided = self.layout.divides_sequence(self.shape.sequence_length)
        return self.layout.tensor if divided else 1

    def hidden(self, count: float = 1) -> float:
        """The bytes of ``count`` residual streams."""
        return count * self.tokens * self.shape.hidden_size * self.width / self.sequence_ranks

    def norm(self, width: int | None = None) -> float:
        """The bytes that a norm keeps beside its input: its output, which the linear behind it
        needs, its statistics and, for unfused RMSNorm, the output before the gain. Unfused RMSNorm
        computes in fp32, and in bf16 keeps its input in fp32 in place of the one that it was
        given."""
        rms = TRANSFORMERS[self.shape.family].norm == "RMSNorm"
        each = 2 * FP32 if self.rms_written_out else self.width
        statistics = FP32 if rms else 2 * (FP32 if self.fused else self.width)
        elements = width or self.shape.hidden_size
        return self.tokens * (elements * each + statistics) / self.sequence_ranks


def _scores(step: Step) -> float:
    """The bytes of the S x S scores of one self-attention, in fp32, where it keeps them."""
    shape, mla = step.shape, step.shape.mla
    if step.fused or mla is None or mla.qk_head_dim == mla.v_head_dim:
        return 0.0
    elements = step.tokens * shape.num_attention_heads * shape.sequence_length
    return elements * FP32 / step.layout.tensor


def _gathered(step: Step) -> float:
    """The bytes of the keys and values of all context-parallel ranks, where attention gathers
    them."""
    shape, mla = step.shape, step.shape.mla
    if not step.gathers:
        return 0.0
    elements = 2 * shape.num_query_groups * shape.head_dim
    if mla is not None:
        elements = shape.num_attention_heads * (mla.qk_head_dim + mla.v_head_dim)
    ranks = step.layout.context / step.layout.tensor
    return elements * step.tokens * step.width * ranks


def _attention(step: Step) -> float:
    """The bytes that one self-attention keeps, from behind its norm to its residual addition."""
    shape, w = step.shape, step.width
    heads, mla = shape.num_attention_heads, shape.mla
    whole, cut = 0.0, 0.0  # bytes a token
    fixed = 0.0
    if mla is not None:
        queries = heads * mla.qk_head_dim
        # rotated and joined queries and keys, values, output, statistics of the softmax
        cut += w * (2 * queries + 2 * heads * mla.v_head_dim) + FP32 * heads
        ranks = [mla.kv_lora_rank, *([mla.q_lora_rank] if mla.q_lora_rank else [])]
        whole += w * (sum(ranks) + mla.qk_rope_head_dim)
        fixed += sum(step.norm(rank) for rank in ranks)
        rotary = mla.qk_rope_head_dim
        if scores := _scores(step):
            fixed += scores
            # no statistics; in bf16 queries, keys and values as they were copied to fp32
            cut -= FP32 * heads
            cut += (FP32 - w) * (2 * queries + heads * mla.v_head_dim)
        if step.gathers:  # in place of this rank's own
            fixed += _gathered(step)
            cut -= w * (queries + heads * mla.v_head_dim)
    else:
        queries, keys = heads * shape.head_dim, shape.num_query_groups * shape.head_dim
        cut += w * (queries + 2 * keys) + w * queries + FP32 * heads
        rotary = shape.head_dim if shape.rope is not None else 0
        if rotary:  # rotated copies; the values stay where the projection wrote them
            cut += w * (queries + keys)
        if TRANSFORMERS[shape.family].qk_norm:
            # unfused the output before the gain, and in bf16 the input in fp32; fused the output
            each = w if step.fused or w == FP32 else 2 * FP32
            cut += each * (queries + keys) + FP32 * (heads + shape.num_query_groups)
        if step.gathers:
            fixed += _gathered(step)
            if rotary:  # what was rotated and gathered is not kept as it came, but by a norm
                cut -= w * keys
                if not TRANSFORMERS[shape.family].qk_norm or w < FP32:
                    cut -= w * (queries + 2 * keys)
    if not step.fused:  # cosines and sines, of queries and of keys, for each position
        fixed += 4 * step.length * rotary * w
    return fixed + step.tokens * (whole / step.sequence_ranks + cut / step.layout.tensor)


def _mlp_elements(step: Step, width: int) -> float:
    """The elements per token of an MLP behind its input: both halves of a gated one, the activation
    and their product. Unfused, the second half counts twice, since Megatron-core adds an offset to
    it."""
    gated = TRANSFORMERS[step.shape.family].gated
    return (3 if step.fused else 5) * width if gated else 2 * width


@dataclass(frozen=True)
class _Mlp:
    """The bytes behind the second norm of a layer, each of one micro-batch."""

    kept: float
    """What is kept, without the input."""
    anew: float
    """What of it need not be kept where parts are computed anew."""
    inside: float
    """The most bytes of its backward pass for a moment, beside what it keeps."""


def _dense(step: Step) -> _Mlp:
    elements = step.tokens * step.width / step.layout.tensor
    kept = elements * _mlp_elements(step, step.shape.ffn_hidden_size)
    # for a moment the gradients of both halves, or of in and out
    inside = elements * 2 * step.shape.ffn_hidden_size
    return _Mlp(kept, kept if "mlp" in step.layout.recompute_modules else 0.0, inside)


def _experts(step: Step) -> _Mlp:
    moe, layout, w = step.shape.moe, step.layout, step.width
    assert moe is not None
    tokens, again = step.tokens / step.sequence_ranks, layout.recompute_modules
    rows = tokens * moe.top_k * layout.expert_tensor
    # their input; unfused one more product: with the router's probability
    elements = _mlp_elements(step, moe.ffn_hidden_size) + (0 if step.fused else moe.ffn_hidden_size)
    kept = rows * w * (step.shape.hidden_size + elements / layout.expert_tensor)
    kept += tokens * 4 * FP32 * moe.num_experts  # logits, scores, probabilities, choice
    hidden = moe.shared_experts * moe.ffn_hidden_size
    shared = step.tokens * w * _mlp_elements(step, hidden) / layout.tensor
    anew = shared if "shared_experts" in again else 0.0
    if "moe_act" in again:  # the product of both halves, which the second linear takes
        anew += rows * w * moe.ffn_hidden_size / layout.expert_tensor
    if "moe" in again:
        anew = kept + shared
    # what came from the experts, twice in their order and once in the tokens'; in fp32 when unfused
    inside = 3 * rows * (w if step.fused else FP32) * step.shape.hidden_size
    return _Mlp(kept + shared, anew, inside)


@dataclass(frozen=True)
class LayerBytes:
    """The bytes of one layer and one micro-batch."""

    kept: float
    """What it keeps for the backward pass, including its input."""
    inside: float
    """The most bytes of its backward pass for a moment, beside what it keeps."""


def layer_bytes(step: Step, kind: str, *, whole: bool = False) -> LayerBytes:
    """The bytes of a layer that is ``dense`` or ``moe``.

    Args:
        whole: whether all of it is computed anew.
    """
    mlp = _experts(step) if kind == MOE else _dense(step)
    norm, attention = step.norm(), _attention(step)
    # Transformer Engine has a norm in the linear behind it, but for latent attention and experts
    apart = (step.shape.mla is not None, kind == MOE) if step.fused else (True, True)
    anew = "layernorm" in step.layout.recompute_modules
    input_anew, norm_anew = (norm if anew and alone else 0.0 for alone in apart)
    attention_anew = _attention_anew(step)
    # behind its norm the MLP's part is there as a whole; when the attention's turn comes it is gone
    at_mlp = mlp.inside + mlp.anew + norm_anew
    # gradients of what was gathered, and their copy for one of the two to be divided among ranks
    at_attention = 2 * _scores(step) + 1.5 * _gathered(step) + attention_anew + input_anew
    gone = mlp.kept - mlp.anew + norm - norm_anew
    inside = step.hidden(2) + max(at_mlp, at_attention - gone)
    kept = step.hidden(2) + 2 * norm - input_anew - norm_anew + attention - attention_anew
    kept += mlp.kept - mlp.anew
    if not whole:
        return LayerBytes(kept, inside)
    return LayerBytes(step.hidden(), inside + kept - step.hidden())


def _attention_anew(step: Step) -> float:
    """The bytes of one self-attention that need not be kept where parts of it are computed anew."""
    shape, mla, again, w = step.shape, step.shape.mla, step.layout.recompute_modules, step.width
    heads, anew = shape.num_attention_heads, 0.0
    tokens = step.tokens / step.layout.tensor
    if "core_attn" in again:
        if scores := _scores(step):
            anew += scores
            if mla is not None and w < FP32:  # the copies in fp32
                anew += tokens * (FP32 - w) * heads * (2 * mla.qk_head_dim + mla.v_head_dim)
        else:
            anew += tokens * FP32 * heads  # statistics of the softmax
    if "mla_up_proj" in again and mla is not None:  # joined queries and keys, values
        # attention that keeps its scores keeps scaled copies of queries and keys as well
        joined = 0 if _scores(step) else 2 * mla.qk_head_dim
        anew += tokens * w * heads * (joined + mla.v_head_dim)
    return anew


def head_bytes(step: Step) -> tuple[float, float]:
    """The bytes that the final norm, the head and the cross-entropy keep, and their temporary
    bytes.

    The vocabulary-parallel cross-entropy keeps exponentials in fp32. In bf16 the logits, and then
    their gradient, are beside them; where there is padding, its mask makes a copy.
    """
    shape, t = step.shape, step.layout.tensor
    logits = step.tokens * shape.padded_vocab_size / t
    weight = shape.padded_vocab_size * shape.hidden_size / t
    beside = step.width < FP32 or shape.vocab_size < shape.padded_vocab_size
    kept = step.hidden() + step.norm() + logits * FP32
    return kept, max(beside * logits * step.width, weight * step.width + step.hidden())


def prediction_bytes(step: Step, kind: str, whole: bool) -> float:
    """The bytes of one prediction module: two norms, their joined output, a layer, and the head
    again."""
    head = head_bytes(step)[0]
    return step.hidden(4) + 2 * step.norm() + layer_bytes(step, kind, whole=whole).kept + head
