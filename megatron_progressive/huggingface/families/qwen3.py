"""Qwen3 as ``Qwen3ForCausalLM``: LLaMA's tensors, with norms of queries and keys."""

from __future__ import annotations

from typing import Any

from megatron_progressive.huggingface.families.llama3 import (
    ATTENTION,
    MLP,
    OUTER,
    ROTARY_BUFFERS,
    decoder_map,
    decoder_sizes,
    decoder_values,
)
from megatron_progressive.huggingface.family import HuggingFaceFamily
from megatron_progressive.huggingface.rotary import rope_of
from megatron_progressive.huggingface.tensors import Entry, Rules
from megatron_progressive.huggingface.values import Values
from megatron_progressive.models.base import TransformerShape

_HEAD_DIM = 128
"""The width of a head in ``Qwen3Config``, whatever the width of the model."""

_NORMS: Rules = {
    "decoder.layers.*.self_attention.q_layernorm.weight": (
        Entry, ("model.layers.*.self_attn.q_norm.weight",)),
    "decoder.layers.*.self_attention.k_layernorm.weight": (
        Entry, ("model.layers.*.self_attn.k_norm.weight",)),
}  # fmt: skip


def _shape_of(config: Values) -> TransformerShape:
    config.require("use_sliding_window", False)
    config.ignore("sliding_window", "max_window_layers")  # they say how, not whether
    types = config.value("layer_types", [])
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        config.refuse("layer_types", "full_attention in every layer", can_be_allowed=True)
    sizes = decoder_sizes(config)
    sizes["head_dim"] = config.integer("head_dim", _HEAD_DIM)
    return TransformerShape(family="qwen3", **sizes, rope=rope_of(config, "llama3"))


def _config_of(shape: TransformerShape) -> dict[str, Any]:
    return {**decoder_values(shape), "attention_bias": False, "use_sliding_window": False}


HUGGING_FACE = HuggingFaceFamily(
    family="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    config_class="Qwen3Config",
    shape_of=_shape_of,
    config_of=_config_of,
    name_map=lambda shape: decoder_map(shape, {**OUTER, **ATTENTION, **MLP, **_NORMS}),
    ignored=ROTARY_BUFFERS,
)
