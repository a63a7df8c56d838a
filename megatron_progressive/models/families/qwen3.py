"""Qwen3: LLaMA 3's parts, and norms of queries and keys (arXiv 2505.09388)."""

from __future__ import annotations

from megatron_progressive.models.transformer_family import TransformerFamily

_COMMON = dict(norm_epsilon=1e-6, rope=dict(theta=1000000.0))
_REAL = dict(**_COMMON, vocab_size=151936, sequence_length=4096, head_dim=128)

FAMILY = TransformerFamily(
    norm="RMSNorm",
    gated=True,
    sections=frozenset({"rope"}),
    qk_norm=True,
    presets={
        "tiny": dict(
            **_COMMON, num_layers=4, hidden_size=64, num_attention_heads=8, num_query_groups=4,
            head_dim=16, ffn_hidden_size=192, tie_embeddings=True, vocab_size=2048,
            sequence_length=128,
        ),
        "0.6b": dict(
            **_REAL, num_layers=28, hidden_size=1024, num_attention_heads=16, num_query_groups=8,
            ffn_hidden_size=3072, tie_embeddings=True,
        ),
        "8b": dict(
            **_REAL, num_layers=36, hidden_size=4096, num_attention_heads=32, num_query_groups=8,
            ffn_hidden_size=12288, tie_embeddings=False,
        ),
    },
)  # fmt: skip
