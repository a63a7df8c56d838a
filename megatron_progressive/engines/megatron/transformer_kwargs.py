"""The family's part of Megatron-core's ``TransformerConfig``."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_progressive.models import TRANSFORMERS
from megatron_progressive.models.base import MOE, TransformerShape


def transformer_config_kwargs(shape: TransformerShape) -> dict[str, Any]:
    """The fields of ``TransformerConfig``, or with latent attention of ``MLATransformerConfig``.

    They are sizes and mathematics only, without layouts, precision or kernels.
    """
    import torch.nn.functional as F

    family = TRANSFORMERS[shape.family]
    values: dict[str, Any] = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        ffn_hidden_size=shape.ffn_hidden_size,
        normalization=family.norm,
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=family.gated,
        # GPT-2's own GeLU is the tanh form. Named here, because Megatron-core's fused GeLU is
        # that form and its unfused one is not.
        activation_func=F.silu if family.gated else partial(F.gelu, approximate="tanh"),
        add_bias_linear=shape.linear_bias,
        qk_layernorm=family.qk_norm or shape.mla is not None,
    )
    if shape.mla is not None and shape.rope is not None:
        mla, rope = shape.mla, shape.rope
        values |= dict(
            multi_latent_attention=True,
            q_lora_rank=mla.q_lora_rank or None,
            kv_lora_rank=mla.kv_lora_rank,
            qk_head_dim=mla.qk_nope_head_dim,
            qk_pos_emb_head_dim=mla.qk_rope_head_dim,
            v_head_dim=mla.v_head_dim,
            rotary_base=rope.theta,
            rope_type="yarn" if rope.scaling == "yarn" else "rope",
            rotary_scaling_factor=rope.factor,
            original_max_position_embeddings=rope.original_length,
            mscale=1.0,
            mscale_all_dim=1.0,
        )
    else:
        values |= dict(num_query_groups=shape.num_query_groups, kv_channels=shape.head_dim)
    if shape.moe is not None and MOE in shape.layer_kinds():
        values |= _experts(shape)
    if shape.mtp_depth:
        values |= dict(mtp_num_layers=shape.mtp_depth, mtp_loss_scaling_factor=shape.mtp_loss_coeff)
    return values


def _experts(shape: TransformerShape) -> dict[str, Any]:
    moe, sigmoid = shape.moe, TRANSFORMERS[shape.family].router == "sigmoid"
    assert moe is not None
    grouped = moe.num_groups > 1
    return dict(
        num_moe_experts=moe.num_experts,
        moe_layer_freq=[int(kind == MOE) for kind in shape.layer_kinds()],
        moe_ffn_hidden_size=moe.ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_experts * moe.ffn_hidden_size or None,
        moe_router_topk=moe.top_k,
        moe_router_score_function="sigmoid" if sigmoid else "softmax",
        moe_router_num_groups=moe.num_groups if grouped else None,
        moe_router_group_topk=moe.top_k_groups if grouped else None,
        moe_router_topk_scaling_factor=moe.routed_scaling_factor,
        moe_router_enable_expert_bias=moe.bias_update_rate > 0,
        moe_router_bias_update_rate=moe.bias_update_rate,
        moe_router_load_balancing_type="aux_loss" if moe.aux_loss_coeff else "none",
        moe_aux_loss_coeff=moe.aux_loss_coeff,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
    )
