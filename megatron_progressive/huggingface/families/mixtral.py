"""Mixtral as ``MixtralForCausalLM``, with experts in every layer under the names in its files."""

from __future__ import annotations

from typing import Any

from megatron_progressive.huggingface.families.llama3 import (
    ATTENTION,
    OUTER,
    ROTARY_BUFFERS,
    decoder_map,
    decoder_sizes,
    decoder_values,
)
from megatron_progressive.huggingface.family import HuggingFaceFamily, inexpressible
from megatron_progressive.huggingface.rotary import rope_of, rope_values
from megatron_progressive.huggingface.tensors import Entry, GateUp, Rules
from megatron_progressive.huggingface.values import Values
from megatron_progressive.models.base import MoE, TransformerShape

_THETA = 1000000.0
"""The base of the rotation in ``MixtralConfig``."""
_AUX_LOSS = 0.001
_TOP_K = "from 2 (it gives a single expert the weight 1; Megatron-core its softmax)"

_EXPERTS: Rules = {
    "decoder.layers.*.mlp.router.weight": (
        Entry, ("model.layers.*.block_sparse_moe.gate.weight",)),
    "decoder.layers.*.mlp.experts.*.linear_fc1.weight": (
        GateUp, ("model.layers.*.block_sparse_moe.experts.*.w1.weight",
                 "model.layers.*.block_sparse_moe.experts.*.w3.weight")),
    "decoder.layers.*.mlp.experts.*.linear_fc2.weight": (
        Entry, ("model.layers.*.block_sparse_moe.experts.*.w2.weight",)),
}  # fmt: skip


def _shape_of(config: Values) -> TransformerShape:
    config.require("sliding_window", None)
    config.require("router_jitter_noise", 0.0)
    sizes = decoder_sizes(config)
    moe = MoE(
        num_experts=config.integer("num_local_experts"),
        top_k=config.integer("num_experts_per_tok", least=2),
        ffn_hidden_size=sizes["ffn_hidden_size"],
        aux_loss_coeff=config.number("router_aux_loss_coef", _AUX_LOSS),
    )
    return TransformerShape(
        family="mixtral", **sizes, rope=rope_of(config, "llama3", _THETA), moe=moe
    )


def _config_of(shape: TransformerShape) -> dict[str, Any]:
    moe = shape.moe
    assert moe is not None
    assert shape.rope is not None
    fixed = MoE(moe.num_experts, moe.top_k, moe.ffn_hidden_size, aux_loss_coeff=moe.aux_loss_coeff)
    for field in vars(fixed):
        got, accepted = getattr(moe, field), getattr(fixed, field)
        if got != accepted:
            raise inexpressible(f"moe.{field}", got, str(accepted), "MixtralForCausalLM")
    if moe.top_k < 2:
        raise inexpressible("moe.top_k", moe.top_k, _TOP_K, "MixtralForCausalLM")
    return {
        **decoder_values(shape),
        **rope_values(shape.rope),
        "intermediate_size": moe.ffn_hidden_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.aux_loss_coeff,
        "sliding_window": None,
    }


HUGGING_FACE = HuggingFaceFamily(
    family="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    config_class="MixtralConfig",
    shape_of=_shape_of,
    config_of=_config_of,
    name_map=lambda shape: decoder_map(shape, {**OUTER, **ATTENTION, **_EXPERTS}),
    ignored=ROTARY_BUFFERS,
)
