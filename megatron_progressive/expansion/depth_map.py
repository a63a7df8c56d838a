"""Depth expansion as a pure map: where each tensor of the deeper model comes from.

Knows tables of global tensors only: no engine, no ranks, no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_progressive.config import ConfigError, ExpansionSection
from megatron_progressive.models.base import TensorSpec, layer_number, with_layer_number
from megatron_progressive.state.boxes import WEIGHT_SLOTS, Key

COPY, INIT, ZERO = "copy", "init", "zero"


@dataclass(frozen=True)
class TensorRule:
    """What fills one target tensor.

    ``weights`` is ``copy`` (from ``source``), ``init`` (its own initial values) or ``zero``;
    ``state`` is ``copy`` (the source's optimizer state) or ``zero`` (as at the first step).
    """

    weights: str
    state: str
    source: str | None = None

    def __post_init__(self) -> None:
        if (self.source is None) and COPY in (self.weights, self.state):
            raise ValueError("a copied tensor needs a source")

    def action(self, slot: str) -> str:
        """What fills a slot of the tensor."""
        return self.weights if slot in WEIGHT_SLOTS else self.state


def source_layers(from_layers: int, to_layers: int, order: str) -> list[int]:
    """Source layer of each target layer where all are copied: ABAB, AABB or ABBB.

    Raises:
        ValueError: unknown order, or nothing to copy.
    """
    if from_layers < 1:
        raise ValueError("copying needs a source layer")
    if order == "stack":
        return [layer % from_layers for layer in range(to_layers)]
    if order == "inter":
        return [layer * from_layers // to_layers for layer in range(to_layers)]
    if order == "last":
        return [min(layer, from_layers - 1) for layer in range(to_layers)]
    raise ValueError(f"order {order!r}")


def survivors(from_layers: int, to_layers: int, order: str, insert: str, copied: bool) -> list[int]:
    """Target layer that *is* each source layer (keeps its optimizer state), in source order.

    Without copying, new layers go below (``bottom``) or above (``top``) all trained ones. With
    copying, a source layer has several copies: the survivor is the last of them when new ones
    are inserted at the bottom, the first when at the top.
    """
    if not copied:
        shift = to_layers - from_layers if insert == "bottom" else 0
        return [layer + shift for layer in range(from_layers)]
    origins = source_layers(from_layers, to_layers, order)
    places = range(to_layers) if insert == "top" else range(to_layers - 1, -1, -1)
    return [next(p for p in places if origins[p] == layer) for layer in range(from_layers)]


def depth_map(
    target_table: dict[str, TensorSpec],
    from_layers: int,
    to_layers: int,
    init: str,
    order: str = "stack",
    insert: str = "bottom",
    optimizer_state: str = "inherit",
) -> dict[str, TensorRule]:
    """The rule of every target tensor.

    Args:
        target_table: the deeper model's tensors.
        init: ``random``, ``zero``, ``copying``, ``copying_zeroL`` (copies whose sub-layers end
            in a zero linear) or ``copying_zeroN`` (copies whose norms have zero gain).
        optimizer_state: ``inherit`` (survivors keep theirs, new layers start empty), ``copy``
            (copies take their source's) or ``reset`` (everything starts empty).

    A ``zeroN`` copy is the identity only where the linears of the model have no biases and the
    norm's own bias is zero as well, so that is zeroed with the gain.
    """
    copied = init.startswith("copying")
    alive = survivors(from_layers, to_layers, order, insert, copied) if from_layers else []
    survivor_of = {target: source for source, target in enumerate(alive)}
    origins = source_layers(from_layers, to_layers, order) if copied else None
    kept = ZERO if optimizer_state == "reset" else COPY
    rules = {}
    for name, spec in target_table.items():
        layer = layer_number(name)
        if layer is None:
            rules[name] = TensorRule(COPY, kept, name)
        elif layer in survivor_of:
            source = with_layer_number(name, survivor_of[layer])
            rules[name] = TensorRule(COPY, kept, source)
        elif origins is None:
            rules[name] = TensorRule(ZERO if init == "zero" else INIT, ZERO)
        else:
            source = with_layer_number(name, origins[layer])
            state = COPY if optimizer_state == "copy" else ZERO
            norm = spec.role in ("norm_gain", "norm_bias")
            zeroed = (init == "copying_zeroL" and spec.last_linear) or (
                init == "copying_zeroN" and norm
            )
            rules[name] = TensorRule(ZERO if zeroed else COPY, state, source)
    return rules


def rules_of(
    expansion: ExpansionSection, target_table: dict[str, TensorSpec], from_layers: int
) -> dict[str, TensorRule]:
    """:func:`depth_map` of a configured expansion."""
    return depth_map(
        target_table,
        from_layers,
        expansion.to_layers,
        expansion.init,
        expansion.order,
        expansion.insert,
        expansion.optimizer_state,
    )


def check_depths(expansion: ExpansionSection, from_layers: int, field: str, whose: str) -> None:
    """Check that an expansion can start from ``from_layers``.

    Args:
        field: what the expansion is called in messages.
        whose: which layers these are, as in "the 2 layers before it".

    Raises:
        ConfigError: a target that is not deeper, or copies of nothing.
    """
    if expansion.to_layers <= from_layers:
        raise ConfigError(
            f"{field}.to_layers: got {expansion.to_layers}; accepted: more than the {from_layers} "
            f"layer{'s' * (from_layers != 1)} {whose}"
        )
    if from_layers == 0 and expansion.init.startswith("copying"):
        raise ConfigError(
            f"{field}.init: got {expansion.init!r} from 0 layers, where nothing can be copied; "
            f"accepted: random, zero"
        )


def copied_from(rules: dict[str, TensorRule]) -> Callable[[Key], Key | None]:
    """The source of a slot of a target tensor; None where it is not copied."""

    def source_of(key: Key) -> Key | None:
        name, slot = key
        rule = rules[name]
        return (rule.source, slot) if rule.action(slot) == COPY and rule.source else None

    return source_of
