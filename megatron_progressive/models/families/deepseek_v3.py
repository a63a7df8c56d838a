"""DeepSeek-V3: latent attention, sigmoid routing in groups with an expert bias that balances the
load, shared experts, dense layers at the bottom, multi-token prediction (arXiv 2412.19437).

``671b`` is the report's shape; its count of 671B leaves out the multi-token prediction module,
which ``model.mtp_layers=1`` adds. The paper on progressive training (arXiv 2511.04981) names models
of 0.2B to 0.5B active parameters without giving their shapes; the presets here keep the report's
proportions at a smaller scale.
"""

from __future__ import annotations

from megatron_progressive.models.transformer_family import TransformerFamily

_COMMON = dict(norm_epsilon=1e-6, tie_embeddings=False)
_SMALL_MLA = dict(
    q_lora_rank=0, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
)

FAMILY = TransformerFamily(
    norm="RMSNorm",
    gated=True,
    sections=frozenset({"rope", "mla", "moe"}),
    router="sigmoid",
    mtp=True,
    presets={
        "tiny": dict(
            **_COMMON, num_layers=4, hidden_size=64, num_attention_heads=4, ffn_hidden_size=192,
            vocab_size=2048, sequence_length=128, rope=dict(theta=10000.0),
            mla=dict(q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8,
                     v_head_dim=16),
            moe=dict(num_experts=8, top_k=2, ffn_hidden_size=48, shared_experts=1,
                     first_k_dense=1, num_groups=2, top_k_groups=1, routed_scaling_factor=1.0,
                     bias_update_rate=0.001),
        ),
        "0.2b": dict(
            **_COMMON, num_layers=12, hidden_size=768, num_attention_heads=12,
            ffn_hidden_size=2304, vocab_size=50304, sequence_length=4096,
            rope=dict(theta=10000.0), mla=_SMALL_MLA,
            moe=dict(num_experts=64, top_k=6, ffn_hidden_size=384, shared_experts=2,
                     first_k_dense=1, routed_scaling_factor=2.5, bias_update_rate=0.001),
        ),
        "0.5b": dict(
            **_COMMON, num_layers=20, hidden_size=1152, num_attention_heads=18,
            ffn_hidden_size=3456, vocab_size=50304, sequence_length=4096,
            rope=dict(theta=10000.0), mla=_SMALL_MLA,
            moe=dict(num_experts=64, top_k=6, ffn_hidden_size=576, shared_experts=2,
                     first_k_dense=1, routed_scaling_factor=2.5, bias_update_rate=0.001),
        ),
        "671b": dict(
            **_COMMON, num_layers=61, hidden_size=7168, num_attention_heads=128,
            ffn_hidden_size=18432, vocab_size=129280, sequence_length=4096,
            rope=dict(theta=10000.0),
            mla=dict(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
                     qk_rope_head_dim=64, v_head_dim=128),
            moe=dict(num_experts=256, top_k=8, ffn_hidden_size=2048, shared_experts=1,
                     first_k_dense=3, num_groups=8, top_k_groups=4, routed_scaling_factor=2.5,
                     bias_update_rate=0.001),
        ),
    },
)  # fmt: skip
