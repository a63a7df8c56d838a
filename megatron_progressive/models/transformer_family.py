"""Families of language models: their parts, and how their sizes follow from each other."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from megatron_progressive.config import ConfigError, DataSection, RunConfig
from megatron_progressive.models.base import MLA, MoE, TensorSpec, TransformerShape
from megatron_progressive.models.family import Family
from megatron_progressive.models.mup import with_mup
from megatron_progressive.models.tensor_table import TableBuilder


@dataclass(frozen=True, kw_only=True)
class TransformerFamily(Family):
    """One architecture of language models."""

    norm: str
    """The norm: ``LayerNorm`` or ``RMSNorm``."""
    gated: bool
    """Whether the MLP is gated (SwiGLU); otherwise it has GeLU in its tanh form."""
    linear_bias: bool = False
    """Whether linears may have biases; where they may, they have them by default."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""
    learned_positions: bool = False
    mtp: bool = False
    """Whether the family may have multi-token prediction modules."""
    router: str = "softmax"
    """How experts are scored: ``softmax`` over the chosen ones, or ``sigmoid``."""

    shape_type = TransformerShape
    engines = ("megatron", "deepspeed")
    data_sizes = ("vocab_size", "sequence_length")
    data_keys: ClassVar[frozenset[str]] = frozenset(f.name for f in fields(DataSection)) - {
        "image_size",
        "num_classes",
    }

    def shape(self, config: RunConfig, num_layers: int | None) -> TransformerShape:
        model = config.model
        preset, given = self.presets[model.preset], self._sizes(config, num_layers)
        sizes: dict[str, Any] = {"linear_bias": self.linear_bias, "mtp_layers": 0, **preset}
        if model.hidden_size is not None:
            scaled = preset["ffn_hidden_size"] * model.hidden_size // preset["hidden_size"]
            sizes |= {"hidden_size": model.hidden_size, "ffn_hidden_size": scaled}
        sizes |= given
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        if "num_query_groups" not in sizes or (
            # fewer heads than the preset's groups of them
            model.num_query_groups is None and heads % sizes["num_query_groups"]
        ):
            sizes["num_query_groups"] = heads
        if "head_dim" not in sizes:
            if hidden % heads and "mla" not in self.sections:
                raise ConfigError(
                    f"model.num_attention_heads: got {heads}; accepted: a divisor of hidden_size "
                    f"{hidden}, or model.head_dim"
                )
            sizes["head_dim"] = max(1, hidden // heads)
        shape = TransformerShape(family=model.family, **sizes)
        check_shape(shape, self)
        return shape

    def table(self, shape: TransformerShape) -> dict[str, TensorSpec]:
        builder = TableBuilder(
            shape, norm_bias=self.norm == "LayerNorm", gated=self.gated, qk_norm=self.qk_norm
        )
        table = builder.model(self.learned_positions)
        return with_mup(table, shape) if shape.mup else table


LLAMA3_ORIGINAL_LENGTH = 8192
"""Megatron-core 0.19.2 has this number in its Llama 3 scaling (``rotary_pos_embedding.py``)."""


def check_shape(shape: TransformerShape, family: TransformerFamily) -> None:
    """Check that the sizes of a shape fit each other.

    Raises:
        ConfigError: they do not; the line names the field, its value and what is accepted.
    """
    if shape.linear_bias and not family.linear_bias:
        raise ConfigError(
            f"model.linear_bias: got true; accepted: false (family {shape.family} has no biases)"
        )
    if shape.mtp_layers and not family.mtp:
        raise ConfigError(
            f"model.mtp_layers: got {shape.mtp_layers}; accepted: 0 (family {shape.family} has no "
            "multi-token prediction)"
        )
    if shape.num_attention_heads % shape.num_query_groups:
        raise ConfigError(
            f"model.num_query_groups: got {shape.num_query_groups}; accepted: a divisor of "
            f"num_attention_heads {shape.num_attention_heads}"
        )
    _check_rope(shape)
    if shape.mla is not None:
        _check_latent_attention(shape.mla)
    if shape.moe is not None:
        _check_experts(shape.moe)
        if shape.moe.top_k == 1 and family.router == "softmax":
            raise ConfigError(
                f"model.moe.top_k: got 1; accepted: from 2 (family {shape.family} takes a softmax "
                "of the chosen experts' scores, which is 1 for a single one)"
            )


def _check_rope(shape: TransformerShape) -> None:
    rope = shape.rope
    if rope is None:
        return
    if shape.mla is None and shape.head_dim % 2:
        raise ConfigError(
            f"model.head_dim: got {shape.head_dim}; accepted: an even number (rotary positions "
            "turn pairs)"
        )
    allowed = ("none", "yarn") if shape.mla is not None else ("none", "llama3")
    if rope.scaling not in allowed:
        raise ConfigError(
            f"model.rope.scaling: got {rope.scaling!r} for family {shape.family}; accepted: "
            f"{', '.join(allowed)}"
        )
    if rope.scaling == "llama3" and rope.original_length != LLAMA3_ORIGINAL_LENGTH:
        raise ConfigError(
            f"model.rope.original_length: got {rope.original_length}; accepted: "
            f"{LLAMA3_ORIGINAL_LENGTH} with scaling llama3"
        )


def _check_latent_attention(mla: MLA) -> None:
    if mla.qk_rope_head_dim % 2:
        raise ConfigError(
            f"model.mla.qk_rope_head_dim: got {mla.qk_rope_head_dim}; accepted: an even number"
        )


def _check_experts(moe: MoE) -> None:
    groups, chosen = moe.num_groups, moe.top_k_groups
    if moe.top_k > moe.num_experts:
        raise ConfigError(
            f"model.moe.top_k: got {moe.top_k}; accepted: up to num_experts {moe.num_experts}"
        )
    if moe.num_experts % groups:
        raise ConfigError(
            f"model.moe.num_groups: got {groups}; accepted: a divisor of num_experts "
            f"{moe.num_experts}"
        )
    if chosen > groups:
        raise ConfigError(
            f"model.moe.top_k_groups: got {chosen}; accepted: up to num_groups {groups}"
        )
    if groups > 1 and (moe.top_k % chosen or moe.top_k // chosen > moe.num_experts // groups):
        raise ConfigError(
            f"model.moe.top_k: got {moe.top_k}; accepted: a multiple of top_k_groups {chosen}, at "
            f"most {chosen * (moe.num_experts // groups)}"
        )
