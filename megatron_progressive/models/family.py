"""What a family is: which parts its models have, and their named shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Preset = dict[str, Any]
"""Fields of :class:`.base.ModelShape`; ``rope``, ``mla`` and ``moe`` are dicts of theirs."""


@dataclass(frozen=True)
class Family:
    """One architecture."""

    presets: dict[str, Preset]
    norm: str
    """``LayerNorm`` or ``RMSNorm``."""
    gated: bool
    """SwiGLU, or else GeLU in its tanh form."""
    sections: frozenset[str] = field(default_factory=frozenset)
    """Of ``rope``, ``mla`` and ``moe``: those that it has."""
    linear_bias: bool = False
    """Whether linears may have biases; they do by default then."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""
    learned_positions: bool = False
    mtp: bool = False
    """Whether it may have multi-token prediction."""
    router: str = "softmax"
    """Scores of experts: ``softmax`` over the chosen ones, or ``sigmoid``."""
