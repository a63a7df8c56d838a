"""Mixtral: LLaMA's attention, and eight experts of which each token takes two (arXiv 2401.04088).

The load is balanced by an auxiliary loss.
"""

from __future__ import annotations

from megatron_progressive.models.transformer_family import TransformerFamily

FAMILY = TransformerFamily(
    norm="RMSNorm",
    gated=True,
    sections=frozenset({"rope", "moe"}),
    router="softmax",
    presets={
        "tiny": dict(
            num_layers=4, hidden_size=64, num_attention_heads=8, num_query_groups=4,
            ffn_hidden_size=128, tie_embeddings=False, vocab_size=2048, sequence_length=128,
            norm_epsilon=1e-5, rope=dict(theta=1000000.0),
            moe=dict(num_experts=8, top_k=2, ffn_hidden_size=128, aux_loss_coeff=0.02),
        ),
        "8x7b": dict(
            num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8,
            ffn_hidden_size=14336, tie_embeddings=False, vocab_size=32000, sequence_length=4096,
            norm_epsilon=1e-5, rope=dict(theta=1000000.0),
            moe=dict(num_experts=8, top_k=2, ffn_hidden_size=14336, aux_loss_coeff=0.02),
        ),
    },
)  # fmt: skip
