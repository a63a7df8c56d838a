"""Model families: shapes, presets and the table of global tensors. Nothing here allocates."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.models.base import ModelShape, TensorSpec, TransformerShape
from megatron_progressive.models.families import deepseek_v3, gpt2, llama3, mixtral, qwen3, resnet
from megatron_progressive.models.family import Family
from megatron_progressive.models.transformer_family import TransformerFamily

TRANSFORMERS: dict[str, TransformerFamily] = {
    "gpt2": gpt2.FAMILY,
    "llama3": llama3.FAMILY,
    "qwen3": qwen3.FAMILY,
    "mixtral": mixtral.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
}
FAMILIES: dict[str, Family] = {**TRANSFORMERS, "resnet": resnet.FAMILY}


def family_of(config: RunConfig) -> Family:
    """The configured family.

    Raises:
        ConfigError: there is no family of that name.
    """
    name = config.model.family
    if name not in FAMILIES:
        raise ConfigError(f"model.family: got {name!r}; accepted: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def model_shape(config: RunConfig, num_layers: int | None = None) -> ModelShape:
    """The configured model; ``num_layers`` replaces the configured depth where it is given.

    Raises:
        ConfigError: the family or the preset is unknown, a part is set that the family does not
            have, or sizes do not fit each other.
    """
    family, preset = family_of(config), config.model.preset
    if preset not in family.presets:
        raise ConfigError(f"model.preset: got {preset!r}; accepted: {', '.join(family.presets)}")
    return family.shape(config, num_layers)


def transformer_shape(config: RunConfig, num_layers: int | None = None) -> TransformerShape:
    """The configured model (:func:`model_shape`), for what only language models have.

    Raises:
        ConfigError: as :func:`model_shape`, and where the family is not one of language models.
    """
    shape = model_shape(config, num_layers)
    if not isinstance(shape, TransformerShape):
        raise ConfigError(
            f"model.family: got {shape.family!r}; accepted here: {', '.join(TRANSFORMERS)}"
        )
    return shape


def shape_from_values(values: dict[str, Any]) -> ModelShape:
    """The shape that ``dataclasses.asdict`` gave these values of.

    Raises:
        KeyError, TypeError: a value is missing or of the wrong type.
    """
    return FAMILIES[values["family"]].shape_from_values(values)


@lru_cache(maxsize=16)
def _table(shape: ModelShape) -> dict[str, TensorSpec]:
    return FAMILIES[shape.family].table(shape)


def tensor_table(shape: ModelShape) -> dict[str, TensorSpec]:
    """Every global tensor of ``shape``, by canonical name."""
    return dict(_table(shape))


def parameter_count(shape: ModelShape) -> int:
    """The number of trainable parameters, without the padding of the vocabulary."""
    return sum(
        spec.numel if spec.live_rows is None else spec.live_rows * spec.shape[1]
        for spec in _table(shape).values()
        if spec.trainable
    )


def active_parameter_count(shape: ModelShape) -> int:
    """The number of parameters that one token is computed with: of the routed experts of a layer it
    takes ``top_k``.

    Tables in which a token is only looked up (positions, and an embedding that is not the head,
    too) multiply nothing and are left out. An image is computed with all parameters.
    """
    if not isinstance(shape, TransformerShape):
        return parameter_count(shape)
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
