"""Families of language models: their parts, and how sizes follow from each other."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from megatron_progressive.config import ConfigError, DataSection, RunConfig
from megatron_progressive.models.base import TensorSpec, TransformerShape
from megatron_progressive.models.blocks import TableBuilder
from megatron_progressive.models.checks import check_shape
from megatron_progressive.models.family import Family
from megatron_progressive.models.mup import with_mup


@dataclass(frozen=True, kw_only=True)
class TransformerFamily(Family):
    """One architecture of language models."""

    norm: str
    """``LayerNorm`` or ``RMSNorm``."""
    gated: bool
    """SwiGLU, or else GeLU in its tanh form."""
    linear_bias: bool = False
    """Whether linears may have biases; they do by default then."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""
    learned_positions: bool = False
    mtp: bool = False
    """Whether it may have multi-token prediction."""
    router: str = "softmax"
    """Scores of experts: ``softmax`` over the chosen ones, or ``sigmoid``."""

    shape_type = TransformerShape
    engines = ("megatron", "deepspeed")
    data_sizes = ("vocab_size", "sequence_length")
    data_keys: ClassVar[frozenset[str]] = frozenset(f.name for f in fields(DataSection)) - {
        "image_size",
        "num_classes",
    }

    def shape(self, config: RunConfig, num_layers: int | None) -> TransformerShape:
        model = config.model
        preset, given = self.presets[model.preset], self._sizes(config, num_layers)
        sizes: dict[str, Any] = {"linear_bias": self.linear_bias, "mtp_layers": 0, **preset}
        if model.hidden_size is not None:
            scaled = preset["ffn_hidden_size"] * model.hidden_size // preset["hidden_size"]
            sizes |= {"hidden_size": model.hidden_size, "ffn_hidden_size": scaled}
        sizes |= given
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        if "num_query_groups" not in sizes or (
            # fewer heads than the preset's groups of them
            model.num_query_groups is None and heads % sizes["num_query_groups"]
        ):
            sizes["num_query_groups"] = heads
        if "head_dim" not in sizes:
            if hidden % heads and "mla" not in self.sections:
                raise ConfigError(
                    f"model.num_attention_heads: got {heads}; accepted: a divisor of hidden_size "
                    f"{hidden}, or model.head_dim"
                )
            sizes["head_dim"] = max(1, hidden // heads)
        shape = TransformerShape(family=model.family, **sizes)
        check_shape(shape, self)
        return shape

    def table(self, shape: TransformerShape) -> dict[str, TensorSpec]:
        builder = TableBuilder(
            shape, norm_bias=self.norm == "LayerNorm", gated=self.gated, qk_norm=self.qk_norm
        )
        table = builder.model(self.learned_positions)
        return with_mup(table, shape) if shape.mup else table
