"""Model families: shapes, presets and the table of global tensors. Nothing here allocates."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import Any

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.models import deepseek_v3, gpt2, llama3, mixtral, qwen3
from megatron_progressive.models.base import MLA, ModelShape, MoE, Rope, TensorSpec
from megatron_progressive.models.blocks import TableBuilder
from megatron_progressive.models.checks import check_shape
from megatron_progressive.models.family import Family
from megatron_progressive.models.mup import with_mup

FAMILIES: dict[str, Family] = {
    "gpt2": gpt2.FAMILY,
    "llama3": llama3.FAMILY,
    "qwen3": qwen3.FAMILY,
    "mixtral": mixtral.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
}
_PARTS = {"rope": Rope, "mla": MLA, "moe": MoE}


def shape_from_values(values: dict[str, Any]) -> ModelShape:
    """The inverse of ``dataclasses.asdict``.

    Raises:
        KeyError, TypeError: something is missing, or of another kind.
    """
    parts = {name: kind(**values[name]) for name, kind in _PARTS.items() if values[name]}
    return ModelShape(**{**values, **parts})


def _given(section: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(section).items() if value is not None}


def model_shape(config: RunConfig, num_layers: int | None = None) -> ModelShape:
    """The configured model, at ``num_layers`` layers where that is given.

    Raises:
        ConfigError: unknown family or preset, a part that the family does not have, or sizes
            that do not fit each other.
    """
    model = config.model
    if model.family not in FAMILIES:
        raise ConfigError(f"model.family: got {model.family!r}; accepted: {', '.join(FAMILIES)}")
    family = FAMILIES[model.family]
    if model.preset not in family.presets:
        raise ConfigError(
            f"model.preset: got {model.preset!r}; accepted: {', '.join(family.presets)}"
        )
    preset = family.presets[model.preset]
    sizes: dict[str, Any] = {"linear_bias": family.linear_bias, "mtp_layers": 0, **preset}
    if model.hidden_size is not None:
        scaled = preset["ffn_hidden_size"] * model.hidden_size // preset["hidden_size"]
        sizes |= {"hidden_size": model.hidden_size, "ffn_hidden_size": scaled}
    given = _given(model)
    for key in ("family", "preset", *_PARTS):
        del given[key]
    sizes |= given
    sizes |= {
        key: value
        for key, value in (
            ("num_layers", num_layers),
            ("vocab_size", config.data.vocab_size),
            ("sequence_length", config.data.sequence_length),
        )
        if value is not None
    }
    for part, kind in _PARTS.items():
        changed = _given(getattr(model, part))
        if changed and part not in family.sections:
            raise ConfigError(
                f"model.{part}.{next(iter(changed))}: got a value for family {model.family}, which "
                f"has no {part}; accepted: none"
            )
        if part in family.sections:
            sizes[part] = kind(**{**preset[part], **changed})
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    if "num_query_groups" not in sizes or (
        # fewer heads than the preset's groups of them
        model.num_query_groups is None and heads % sizes["num_query_groups"]
    ):
        sizes["num_query_groups"] = heads
    if "head_dim" not in sizes:
        if hidden % heads and "mla" not in family.sections:
            raise ConfigError(
                f"model.num_attention_heads: got {heads}; accepted: a divisor of hidden_size "
                f"{hidden}, or model.head_dim"
            )
        sizes["head_dim"] = max(1, hidden // heads)
    shape = ModelShape(family=model.family, **sizes)
    check_shape(shape, family)
    return shape


@lru_cache(maxsize=16)
def _table(shape: ModelShape) -> dict[str, TensorSpec]:
    family = FAMILIES[shape.family]
    builder = TableBuilder(
        shape, norm_bias=family.norm == "LayerNorm", gated=family.gated, qk_norm=family.qk_norm
    )
    table = builder.model(family.learned_positions)
    return with_mup(table, shape) if shape.mup else table


def tensor_table(shape: ModelShape) -> dict[str, TensorSpec]:
    """Every global tensor of ``shape``, by canonical name."""
    return dict(_table(shape))


def parameter_count(shape: ModelShape) -> int:
    """Trainable parameters, the padding of the vocabulary left out."""
    return sum(
        spec.numel if spec.live_rows is None else spec.live_rows * spec.shape[1]
        for spec in _table(shape).values()
        if spec.trainable
    )


def active_parameter_count(shape: ModelShape) -> int:
    """Parameters that one token is computed with: of the routed experts of a layer, its ``top_k``.

    Tables that a token is only looked up in (an embedding that is not the head too, positions)
    multiply nothing and are left out.
    """
    table = _table(shape).values()
    lookups = [
        spec
        for spec in table
        if spec.role == "position" or (spec.role == "embedding" and not shape.tie_embeddings)
    ]
    looked_up = sum((spec.live_rows or spec.shape[0]) * spec.shape[1] for spec in lookups)
    routed = sum(spec.numel for spec in table if spec.expert is not None)
    idle = routed - routed * shape.moe.top_k // shape.moe.num_experts if shape.moe else 0
    return parameter_count(shape) - looked_up - idle
