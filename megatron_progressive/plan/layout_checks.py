"""Checks of how a layout's ranks divide a sequence, and of what they compute anew."""

from __future__ import annotations

from megatron_progressive.config import ConfigError, ParallelSection, RunConfig
from megatron_progressive.models import model_shape
from megatron_progressive.models.base import MOE, ModelShape, TransformerShape


def check_sequence(shape: ModelShape, parallel: ParallelSection, prefix: str) -> None:
    """Refuse sequence parallelism that a phase cannot have, or cannot be without.

    Raises:
        ConfigError: it is set to true without tensor parallelism or for a sequence that this does
            not divide, or to false for experts under tensor parallelism.
    """
    tensor, context, wanted = parallel.tensor, parallel.context, parallel.sequence
    if wanted is None or not isinstance(shape, TransformerShape):
        if wanted:
            raise ConfigError(
                f"{prefix}parallel.sequence: got true for family {shape.family}; accepted: nothing"
            )
        return
    if wanted and (tensor == 1 or shape.sequence_length % (tensor * context)):
        why = "without tensor parallelism"
        if tensor > 1:
            ranks, does = f"tensor {tensor}", "which does"
            if context > 1:
                ranks, does = f"{ranks} and context {context}", "whose product does"
            why = f"with {ranks}, {does} not divide sequence_length {shape.sequence_length}"
        raise ConfigError(f"{prefix}parallel.sequence: got true {why}; accepted: false, or nothing")
    if not wanted and tensor > 1 and MOE in shape.layer_kinds():
        raise ConfigError(
            f"{prefix}parallel.sequence: got false with experts and tensor {tensor}, which "
            "Megatron-core has only with it; accepted: true, or nothing"
        )


def check_context(
    shape: ModelShape, parallel: ParallelSection, prefix: str, attention: str | None
) -> None:
    """Refuse context parallelism that a phase cannot have.

    Args:
        attention: ``data.attention``.

    Raises:
        ConfigError: samples whose documents attend to themselves alone, or a sequence that does not
            divide into two chunks for each rank, or not again over tensor-parallel ranks where it
            must.
    """
    context, tensor = parallel.context, parallel.tensor
    if context == 1 or not isinstance(shape, TransformerShape):
        return
    if attention is not None:
        raise ConfigError(
            f"{prefix}parallel.context: got {context} with data.attention {attention!r}; "
            "accepted: 1, or data.attention: null"
        )
    length = shape.sequence_length
    if length % (2 * context):
        fix = "1" if length % 2 else f"a divisor of {length // 2}"
        raise ConfigError(
            f"{prefix}parallel.context: got {context} for sequence_length {length}; accepted: "
            f"{fix} (each rank has two chunks of a sequence)"
        )
    if MOE in shape.layer_kinds() and length % (tensor * context):
        raise ConfigError(
            f"{prefix}parallel.context: got {context} with experts, tensor {tensor} and "
            f"sequence_length {length}; accepted: a divisor of {length // tensor}"
        )


def check_recompute(config: RunConfig) -> None:
    """Refuse recomputation that no phase of a run could do.

    Raises:
        ConfigError: an engine without it, parts that the model's layers lack, or keys whose kind of
            recomputation no phase asks for.
    """
    depths = [None, *(expansion.to_layers for expansion in config.expansion)]
    sections = [config.parallel_after(index) for index in range(len(depths))]
    prefixes = ["", *(f"expansion[{index}]." for index in range(len(config.expansion)))]
    parts: set[str] = set()
    for depth, section, prefix in zip(depths, sections, prefixes, strict=True):
        shape = model_shape(config, depth)
        if isinstance(shape, TransformerShape):
            parts |= shape.recomputable()
        elif section.recompute != "none":
            raise ConfigError(
                f"{prefix}parallel.recompute: got {section.recompute} for family {shape.family}; "
                "accepted: none"
            )
    kinds = {section.recompute for section in sections}
    for name, kind, default in (
        ("recompute_modules", "selective", ParallelSection().recompute_modules),
        ("recompute_layers", "full", None),
    ):
        for section, prefix in zip(sections, prefixes, strict=True):
            value = getattr(section, name)
            if value != default and kind not in kinds:
                raise ConfigError(
                    f"{prefix}parallel.{name}: got {_words(value)} without recompute: {kind}; "
                    "accepted: with it, or nothing"
                )
    for section, prefix in zip(sections, prefixes, strict=True):
        if section.recompute != "selective":
            continue
        lacking = sorted(set(section.recompute_modules) - parts)
        if lacking or not section.recompute_modules:
            got = lacking[0] if lacking else "none"
            raise ConfigError(
                f"{prefix}parallel.recompute_modules: got {got}; accepted: some of "
                f"{', '.join(sorted(parts))} (parts of this model's layers)"
            )


def _words(value: list[str] | int) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)
