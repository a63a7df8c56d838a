"""LLaMA 3 as ``LlamaForCausalLM``, and what the other decoders share with it."""

from __future__ import annotations

from typing import Any

from megatron_progressive.huggingface.family import HuggingFaceFamily, inexpressible
from megatron_progressive.huggingface.rotary import rope_of, rope_values
from megatron_progressive.huggingface.tensors import (
    QKV,
    Copy,
    Entry,
    GateUp,
    NameMap,
    Rules,
    VocabularyRows,
    entries_of,
)
from megatron_progressive.huggingface.values import Values
from megatron_progressive.models.base import TransformerShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

OUTER: Rules = {
    "embedding.word_embeddings.weight": (VocabularyRows, (EMBEDDING,)),
    "output_layer.weight": (VocabularyRows, (HEAD,)),
    "decoder.final_layernorm.weight": (Entry, ("model.norm.weight",)),
    "decoder.layers.*.input_layernorm.weight": (
        Entry, ("model.layers.*.input_layernorm.weight",)),
    "decoder.layers.*.pre_mlp_layernorm.weight": (
        Entry, ("model.layers.*.post_attention_layernorm.weight",)),
}  # fmt: skip
ATTENTION: Rules = {
    "decoder.layers.*.self_attention.linear_qkv.weight": (
        QKV, ("model.layers.*.self_attn.q_proj.weight",
              "model.layers.*.self_attn.k_proj.weight",
              "model.layers.*.self_attn.v_proj.weight")),
    "decoder.layers.*.self_attention.linear_proj.weight": (
        Entry, ("model.layers.*.self_attn.o_proj.weight",)),
}  # fmt: skip
MLP: Rules = {
    "decoder.layers.*.mlp.linear_fc1.weight": (
        GateUp, ("model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight")),
    "decoder.layers.*.mlp.linear_fc2.weight": (
        Entry, ("model.layers.*.mlp.down_proj.weight",)),
}  # fmt: skip
ROTARY_BUFFERS = (
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\."
    r"(inv_freq|original_inv_freq|cos_cached|sin_cached)"
)


def decoder_map(shape: TransformerShape, rules: Rules) -> NameMap:
    """The map of a family that has no tensors of its own kind on either side."""
    entries = tuple(entries_of(shape, rules))
    return NameMap(entries, copies=tied_head(shape, entries, HEAD))


def tied_head(shape: TransformerShape, entries: tuple[Entry, ...], head: str) -> tuple[Copy, ...]:
    """The head that some files of a tied model have nevertheless."""
    return (Copy(head, entries[0], written=False),) if shape.tie_embeddings else ()


def decoder_sizes(config: Values) -> dict[str, Any]:
    """The sizes of attention, vocabulary and norms, by their field of the shape.

    A size that is missing or of the wrong type, and an option that no family here has, is noted.
    """
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    if not config.has("head_dim") and hidden % heads and config.findings.sizes_are_known:
        config.refuse("num_attention_heads", f"a divisor of hidden_size {hidden}")
    config.require("is_encoder_decoder", False)
    config.require("hidden_act", "silu", "swish")
    config.require("attention_bias", False)
    return dict(
        num_layers=config.integer("num_hidden_layers", least=0),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=config.integer("num_key_value_heads", heads),
        head_dim=config.integer("head_dim", max(1, hidden // heads)),
        ffn_hidden_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        sequence_length=config.integer("max_position_embeddings"),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        linear_bias=False,
        norm_epsilon=config.number("rms_norm_eps"),
    )


def decoder_values(shape: TransformerShape) -> dict[str, Any]:
    """The keys that all decoders have in common; this is the inverse of :func:`decoder_sizes`."""
    assert shape.rope is not None
    return {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_hidden_size,
        "hidden_act": "silu",
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.sequence_length,
        "tie_word_embeddings": shape.tie_embeddings,
        "rms_norm_eps": shape.norm_epsilon,
        **rope_values(shape.rope),
    }


def _shape_of(config: Values) -> TransformerShape:
    config.require("mlp_bias", False)
    sizes = decoder_sizes(config)
    return TransformerShape(family="llama3", **sizes, rope=rope_of(config, "llama3"))


def _config_of(shape: TransformerShape) -> dict[str, Any]:
    if shape.hidden_size % shape.num_attention_heads:
        raise inexpressible(
            "num_attention_heads", shape.num_attention_heads,
            f"a divisor of hidden_size {shape.hidden_size}", "LlamaForCausalLM",
        )  # fmt: skip
    return {**decoder_values(shape), "attention_bias": False, "mlp_bias": False}


HUGGING_FACE = HuggingFaceFamily(
    family="llama3",
    model_type="llama",
    architecture="LlamaForCausalLM",
    config_class="LlamaConfig",
    shape_of=_shape_of,
    config_of=_config_of,
    name_map=lambda shape: decoder_map(shape, {**OUTER, **ATTENTION, **MLP}),
    ignored=ROTARY_BUFFERS,
)
