"""Which rule updates which tensor, and the slots that the rule keeps. Needs no torch."""

from __future__ import annotations

from megatron_progressive.config import OptimSection
from megatron_progressive.models.base import TensorSpec

MUON, NSGD, ADAMW = "muon", "nsgd", "adamw"

STEP = "step"
"""AdamW's count of a tensor's own steps, a number; the other slots have the tensor's shape."""
STATE_SLOTS = {MUON: ("momentum",), NSGD: ("momentum",), ADAMW: ("exp_avg", "exp_avg_sq")}
"""Slots of the tensor's shape that each rule keeps, fp32 all."""


def rule_of(spec: TensorSpec, optim: OptimSection) -> str:
    """Which rule updates a tensor: ``muon``, ``nsgd`` or ``adamw``."""
    if optim.name == ADAMW:
        return ADAMW
    if spec.role in ("embedding", "position", "head"):
        return optim.embeddings
    return MUON if len(spec.shape) > 1 and spec.role != "bias" else NSGD
