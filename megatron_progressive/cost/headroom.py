"""What growing can win at all: how much a short control is expected to lose, by a published law.

``L(N, D) = E + A / N^alpha + B / D^beta`` (Hoffmann et al. 2022, arXiv 2203.15556, approach 3) with
the constants that Besiroglu et al. 2024 (arXiv 2404.10102) found in the same data. They are of
dense models on web text, AdamW and a cosine schedule: a rough guide for anything else, and a loss
by this law is not to be compared with a loss of another tokenizer.
"""

from __future__ import annotations

E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
LAW = "Chinchilla's law with the constants of Besiroglu et al. 2024"


def expected_loss(params: float, tokens: float) -> float:
    """Loss in nats per token of ``params`` parameters trained on ``tokens`` tokens."""
    return float(E + A / params**ALPHA + B / tokens**BETA)


def headroom_percent(params: float, tokens: float, share: float) -> float:
    """How much higher the same model ends, in %, with ``share`` of its tokens and so of its FLOPs:
    what a run that grows has to undercut to pay.

    Args:
        params: parameters of the full-depth model, those that one token is computed with.
        tokens: of the fixed-size run.
        share: above 0, at most 1.

    Raises:
        ValueError: a share out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}; accepted: above 0, up to 1")
    return 100 * (expected_loss(params, share * tokens) / expected_loss(params, tokens) - 1)
