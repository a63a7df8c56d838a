"""LLaMA 3: rotary positions, RMSNorm, SwiGLU, grouped-query attention.

``8b`` and ``70b`` are Llama 3's (Grattafiori et al. 2024, arXiv 2407.21783, table 3). The paper on
progressive training (arXiv 2511.04981) names sizes of about 0.25B to 2B without giving their
shapes; the presets here have heads of width 64, about one key-value head for four query heads, and
a tied embedding, as the small models of Llama 3.2 have.
"""

from __future__ import annotations

from typing import Any

from megatron_progressive.models.family import Preset
from megatron_progressive.models.transformer_family import TransformerFamily


def _preset(
    layers: int, hidden: int, heads: int, groups: int, ffn: int, *, tied: bool = True, **more: Any
) -> Preset:
    values = dict(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_query_groups=groups,
        ffn_hidden_size=ffn, tie_embeddings=tied, vocab_size=128256, sequence_length=4096,
        norm_epsilon=1e-5, rope=dict(theta=500000.0),
    )  # fmt: skip
    return {**values, **more}


FAMILY = TransformerFamily(
    norm="RMSNorm",
    gated=True,
    sections=frozenset({"rope"}),
    presets={
        "tiny": _preset(4, 64, 8, 4, 192, vocab_size=2048, sequence_length=128),
        "0.25b": _preset(11, 1024, 16, 4, 2816),
        "0.5b": _preset(20, 1280, 20, 4, 3584),
        "1b": _preset(24, 1792, 28, 4, 4864),
        "2b": _preset(32, 2304, 36, 4, 6144),
        "8b": _preset(32, 4096, 32, 8, 14336, tied=False, sequence_length=8192),
        "70b": _preset(80, 8192, 64, 8, 28672, tied=False, sequence_length=8192),
    },
)
