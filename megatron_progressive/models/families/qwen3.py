"""Qwen3: LLaMA 3's parts, and norms of queries and keys (arXiv 2505.09388).

The presets but ``tiny`` have the sizes in the ``config.json`` of Qwen/Qwen3-0.6B to Qwen/Qwen3-32B,
and the report's 4,096 tokens of pre-training in a sequence (its section 3.2).
"""

from __future__ import annotations

from megatron_progressive.models.family import Preset
from megatron_progressive.models.transformer_family import TransformerFamily

_COMMON = dict(norm_epsilon=1e-6, rope=dict(theta=1000000.0))


def _preset(layers: int, hidden: int, heads: int, ffn: int, *, tied: bool = False) -> Preset:
    return dict(
        **_COMMON, num_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        num_query_groups=8, head_dim=128, ffn_hidden_size=ffn, tie_embeddings=tied,
        vocab_size=151936, sequence_length=4096,
    )  # fmt: skip


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
        "0.6b": _preset(28, 1024, 16, 3072, tied=True),
        "1.7b": _preset(28, 2048, 16, 6144, tied=True),
        "4b": _preset(36, 2560, 32, 9728, tied=True),
        "8b": _preset(36, 4096, 32, 12288),
        "14b": _preset(40, 5120, 40, 17408),
        "32b": _preset(64, 5120, 64, 25600),
    },
)  # fmt: skip
