"""Model families: shapes, presets and the table of global tensors. Nothing here allocates."""

from __future__ import annotations

from types import ModuleType

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.models import gpt2
from megatron_progressive.models.base import ModelShape, TensorSpec

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2}


def model_shape(config: RunConfig, num_layers: int | None = None) -> ModelShape:
    """The configured model, at ``num_layers`` layers where that is given.

    Raises:
        ConfigError: unknown family or preset, or heads that do not divide the width.
    """
    model = config.model
    if model.family not in FAMILIES:
        raise ConfigError(f"model.family: got {model.family!r}; accepted: {', '.join(FAMILIES)}")
    presets = FAMILIES[model.family].PRESETS
    if model.preset not in presets:
        raise ConfigError(f"model.preset: got {model.preset!r}; accepted: {', '.join(presets)}")
    sizes = dict(presets[model.preset])
    if model.hidden_size is not None:
        sizes["hidden_size"] = model.hidden_size
        sizes["ffn_hidden_size"] = 4 * model.hidden_size
    chosen = {
        "num_layers": num_layers if num_layers is not None else model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "vocab_size": config.data.vocab_size,
        "sequence_length": config.data.sequence_length,
    }
    sizes.update({key: value for key, value in chosen.items() if value is not None})
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ConfigError(
            f"model.num_attention_heads: got {sizes['num_attention_heads']}; accepted: a divisor "
            f"of hidden_size {sizes['hidden_size']}"
        )
    return ModelShape(
        family=model.family,
        tie_embeddings=model.tie_embeddings,
        linear_bias=model.linear_bias,
        **sizes,
    )


def tensor_table(shape: ModelShape) -> dict[str, TensorSpec]:
    """Every global tensor of ``shape``, by canonical name."""
    table: dict[str, TensorSpec] = FAMILIES[shape.family].tensors(shape)
    return table


def parameter_count(shape: ModelShape) -> int:
    """Trainable parameters, the padded vocabulary included."""
    return sum(spec.numel for spec in tensor_table(shape).values())
