"""Whether the sizes of a model fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_progressive.config import ConfigError
from megatron_progressive.models.base import MLA, MoE, TransformerShape

if TYPE_CHECKING:
    from megatron_progressive.models.transformer_family import TransformerFamily

LLAMA3_ORIGINAL_LENGTH = 8192
"""Megatron-core 0.19.2 has this number in its Llama 3 scaling (``rotary_pos_embedding.py``)."""


def check_shape(shape: TransformerShape, family: TransformerFamily) -> None:
    """Check a shape.

    Raises:
        ConfigError: sizes that do not fit; one line with the field, its value and the fix.
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
