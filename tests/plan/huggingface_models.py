"""Hugging Face's models of a shape, as an independent count of parameters and FLOPs."""

from __future__ import annotations

from typing import Any

import torch

from megatron_progressive.models.base import TransformerShape


def build(shape: TransformerShape, device: str = "cpu") -> Any:
    """transformers' model of ``shape``, with its vocabulary padded or not as it says.

    Attention is eager and so are the experts: torch's counter sees the products of both.
    """
    import transformers as hf

    common = dict(
        num_hidden_layers=shape.num_layers, hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads, vocab_size=shape.vocab_size,
        max_position_embeddings=shape.sequence_length, tie_word_embeddings=shape.tie_embeddings,
        attn_implementation="eager", pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    groups = dict(num_key_value_heads=shape.num_query_groups, head_dim=shape.head_dim)
    ffn = shape.ffn_hidden_size
    if shape.family == "gpt2":
        config: Any = hf.GPT2Config(
            n_layer=shape.num_layers, n_embd=shape.hidden_size, n_inner=ffn,
            n_head=shape.num_attention_heads, n_positions=shape.sequence_length,
            vocab_size=shape.vocab_size, tie_word_embeddings=shape.tie_embeddings,
            bos_token_id=0, eos_token_id=0, attn_implementation="eager",
        )  # fmt: skip
    elif shape.family == "llama3":
        config = hf.LlamaConfig(**common, **groups, intermediate_size=ffn)
    elif shape.family == "qwen3":
        config = hf.Qwen3Config(**common, **groups, intermediate_size=ffn)
    elif shape.family == "mixtral":
        assert shape.moe is not None
        config = hf.MixtralConfig(
            **common, **groups, intermediate_size=shape.moe.ffn_hidden_size,
            num_local_experts=shape.moe.num_experts, num_experts_per_tok=shape.moe.top_k,
        )  # fmt: skip
    else:
        assert shape.moe is not None
        assert shape.mla is not None
        moe, mla = shape.moe, shape.mla
        config = hf.DeepseekV3Config(
            **common, num_key_value_heads=shape.num_attention_heads, intermediate_size=ffn,
            q_lora_rank=mla.q_lora_rank or None, kv_lora_rank=mla.kv_lora_rank,
            qk_nope_head_dim=mla.qk_nope_head_dim, qk_rope_head_dim=mla.qk_rope_head_dim,
            v_head_dim=mla.v_head_dim, moe_intermediate_size=moe.ffn_hidden_size,
            n_routed_experts=moe.num_experts, num_experts_per_tok=moe.top_k,
            n_shared_experts=moe.shared_experts, first_k_dense_replace=moe.first_k_dense,
            n_group=moe.num_groups, topk_group=moe.top_k_groups,
        )  # fmt: skip
    config._experts_implementation = "eager"
    with torch.device(device):
        return hf.AutoModelForCausalLM.from_config(config)
