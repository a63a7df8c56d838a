"""GPT-2 as ``GPT2LMHeadModel``, with transposed linears, biases, and one tensor for queries, keys
and values."""

from __future__ import annotations

from typing import Any

from megatron_progressive.huggingface.families.llama3 import tied_head
from megatron_progressive.huggingface.family import HuggingFaceFamily, inexpressible
from megatron_progressive.huggingface.tensors import (
    Entry,
    FusedQKV,
    NameMap,
    Rules,
    Transposed,
    VocabularyRows,
    entries_of,
)
from megatron_progressive.huggingface.values import Values
from megatron_progressive.models.base import TransformerShape

_HEAD = "lm_head.weight"
_LINEARS = {
    "self_attention.linear_proj": ("attn.c_proj", Transposed),
    "self_attention.linear_qkv": ("attn.c_attn", FusedQKV),
    "mlp.linear_fc1": ("mlp.c_fc", Transposed),
    "mlp.linear_fc2": ("mlp.c_proj", Transposed),
}
_NORMS = {"input_layernorm": "ln_1", "pre_mlp_layernorm": "ln_2"}
_RULES: Rules = {
    "embedding.word_embeddings.weight": (VocabularyRows, ("transformer.wte.weight",)),
    "embedding.position_embeddings.weight": (Entry, ("transformer.wpe.weight",)),
    "output_layer.weight": (VocabularyRows, (_HEAD,)),
    **{
        f"decoder.final_layernorm.{part}": (Entry, (f"transformer.ln_f.{part}",))
        for part in ("weight", "bias")
    },
    **{
        f"decoder.layers.*.{ours}.{part}": (Entry, (f"transformer.h.*.{theirs}.{part}",))
        for ours, theirs in _NORMS.items()
        for part in ("weight", "bias")
    },
    **{
        f"decoder.layers.*.{ours}.weight": (kind, (f"transformer.h.*.{theirs}.weight",))
        for ours, (theirs, kind) in _LINEARS.items()
    },
    **{
        f"decoder.layers.*.{ours}.bias": (
            FusedQKV if kind is FusedQKV else Entry, (f"transformer.h.*.{theirs}.bias",))
        for ours, (theirs, kind) in _LINEARS.items()
    },
}  # fmt: skip


def _shape_of(config: Values) -> TransformerShape:
    config.require("is_encoder_decoder", False)
    config.require("activation_function", "gelu_new", "gelu_pytorch_tanh")
    config.require("scale_attn_weights", True)
    config.require("scale_attn_by_inverse_layer_idx", False)
    config.require("add_cross_attention", False)
    config.ignore("reorder_and_upcast_attn", "n_ctx", "summary_type", "summary_use_proj",
                  "summary_activation", "summary_proj_to_labels",
                  "summary_first_dropout")  # fmt: skip
    heads, hidden = config.integer("n_head"), config.integer("n_embd")
    if hidden % heads and config.findings.sizes_are_known:
        config.refuse("n_head", f"a divisor of n_embd {hidden}")
    return TransformerShape(
        family="gpt2",
        num_layers=config.integer("n_layer", least=0),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden // heads,
        ffn_hidden_size=config.integer("n_inner", 4 * hidden),
        vocab_size=config.integer("vocab_size"),
        sequence_length=config.integer("n_positions"),
        tie_embeddings=config.flag("tie_word_embeddings", True),
        linear_bias=True,
        norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
    )


def _config_of(shape: TransformerShape) -> dict[str, Any]:
    heads, hidden = shape.num_attention_heads, shape.hidden_size
    for field, got, accepted in (
        ("linear_bias", shape.linear_bias, True),
        ("num_query_groups", shape.num_query_groups, heads),
        ("head_dim", shape.head_dim * heads / hidden, 1),
    ):
        if got != accepted:
            what = f"hidden_size / num_attention_heads = {hidden / heads:g}"
            raise inexpressible(
                field,
                str(getattr(shape, field)).lower(),
                what if field == "head_dim" else str(accepted).lower(),
                "GPT2LMHeadModel",
            )
    return {
        "n_layer": shape.num_layers,
        "n_embd": hidden,
        "n_head": heads,
        "n_inner": shape.ffn_hidden_size,
        "n_positions": shape.sequence_length,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tie_embeddings,
        "layer_norm_epsilon": shape.norm_epsilon,
        "activation_function": "gelu_new",
        # the model was trained without
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _name_map(shape: TransformerShape) -> NameMap:
    entries = tuple(entries_of(shape, _RULES))
    return NameMap(entries, copies=tied_head(shape, entries, _HEAD))


HUGGING_FACE = HuggingFaceFamily(
    family="gpt2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    config_class="GPT2Config",
    shape_of=_shape_of,
    config_of=_config_of,
    name_map=_name_map,
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",  # causal masks
    base_prefix="transformer.",
)
