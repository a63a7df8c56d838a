"""The rule that updates each tensor, and the slots of state that the rule keeps. Needs no torch."""

from __future__ import annotations

from megatron_progressive.config import OptimSection
from megatron_progressive.models.base import TensorSpec

MUON, NSGD, ADAMW = "muon", "nsgd", "adamw"

STEP = "step"
"""AdamW's count of the steps of one tensor, a number; the other slots have the tensor's shape."""
STATE_SLOTS = {MUON: ("momentum",), NSGD: ("momentum",), ADAMW: ("exp_avg", "exp_avg_sq")}
"""The slots of the tensor's shape that each rule keeps, all in fp32."""


def rule_of(spec: TensorSpec, optim: OptimSection) -> str:
    """The rule that updates a tensor: ``muon``, ``nsgd`` or ``adamw``."""
    if optim.name == ADAMW:
        return ADAMW
    if spec.role in ("embedding", "position", "head"):
        return optim.embeddings
    return MUON if len(spec.shape) > 1 and spec.role != "bias" else NSGD
