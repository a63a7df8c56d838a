"""GPT-2: learned positions, LayerNorm, GeLU, full attention, tied or untied embedding."""

from __future__ import annotations

from megatron_progressive.models.transformer_family import TransformerFamily

FAMILY = TransformerFamily(
    norm="LayerNorm",
    gated=False,
    linear_bias=True,
    learned_positions=True,
    presets={
        "tiny": dict(
            num_layers=6, hidden_size=64, num_attention_heads=4, ffn_hidden_size=256,
            vocab_size=2048, sequence_length=128, norm_epsilon=1e-5, tie_embeddings=True,
        ),
        "124m": dict(
            num_layers=12, hidden_size=768, num_attention_heads=12, ffn_hidden_size=3072,
            vocab_size=50257, sequence_length=1024, norm_epsilon=1e-5, tie_embeddings=True,
        ),
        "7b": dict(
            num_layers=60, hidden_size=3072, num_attention_heads=24, ffn_hidden_size=12288,
            vocab_size=50257, sequence_length=1024, norm_epsilon=1e-5, tie_embeddings=True,
        ),
    },
)  # fmt: skip
