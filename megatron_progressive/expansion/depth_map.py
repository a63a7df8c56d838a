"""Depth expansion as a pure map: where each tensor of the deeper model comes from.

This module knows tables of global tensors only: no engine, no ranks, no data. A model has one stack
of layers or several, like the stages of a residual network, and each stack is expanded on its own.
The layers of a stack are of one or two kinds (dense layers and layers with experts, or a stage's
first block and its other blocks; see :meth:`.ModelShape.stacks`). The kind belongs to the number of
a layer, so trained and new layers stay in the places of their kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_progressive.config import ConfigError, ExpansionSection
from megatron_progressive.expansion.placing import Block, source_layers, survivors
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import ModelShape, layer_of, with_layer_number
from megatron_progressive.reshard.boxes import WEIGHT_SLOTS, Key

COPY, INIT, ZERO = "copy", "init", "zero"


@dataclass(frozen=True)
class TensorRule:
    """The rule that says what fills one target tensor.

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
        """What fills one slot of the tensor."""
        return self.weights if slot in WEIGHT_SLOTS else self.state


def depth_map(
    source: ModelShape,
    target: ModelShape,
    init: str,
    order: str = "stack",
    insert: str = "bottom",
    optimizer_state: str = "inherit",
    block: Block | None = None,
) -> dict[str, TensorRule]:
    """The rule of every target tensor.

    Args:
        source, target: the same model at two depths.
        init: ``random``, ``zero``, ``copying``, ``copying_zeroL`` (copies whose sub-layers end in a
            zero linear) or ``copying_zeroN`` (copies whose norms have zero gain).
        optimizer_state: ``inherit`` (survivors keep theirs, new layers start empty), ``copy``
            (copies take that of their source) or ``reset`` (everything starts empty).
        order, insert, block: how layers are placed (:func:`.placing.source_layers` and
            :func:`.placing.survivors`).

    A copy takes what its source layer has under the same name and in the same shape. What that
    layer lacks gets its own initial values, for example the experts where a dense layer is copied
    to one with experts; so do multi-token prediction modules where the source has none.

    A ``zeroN`` copy is the identity only where the linears of the model have no biases and the
    norm's own bias is zero as well, so that is zeroed with the gain.
    """
    copied = init.startswith("copying")
    before = source.stacks()
    survivor_of: dict[tuple[str, int], int] = {}
    origins: dict[tuple[str, int], int] = {}
    for stack, kinds in target.stacks().items():
        trained = before[stack]
        alive = survivors(trained, kinds, order, insert, copied, block) if trained else []
        survivor_of |= {(stack, place): layer for layer, place in enumerate(alive)}
        if copied:
            copies = source_layers(trained, kinds, order, insert, block)
            origins |= {(stack, place): layer for place, layer in enumerate(copies)}
    kept = ZERO if optimizer_state == "reset" else COPY
    have = tensor_table(source)
    rules = {}
    for name, spec in tensor_table(target).items():
        layer = layer_of(name)
        if layer is None:
            origin: str | None = name
        elif layer in survivor_of:
            origin = with_layer_number(name, survivor_of[layer])
        else:
            origin = with_layer_number(name, origins[layer]) if layer in origins else None
        new = layer is not None and layer not in survivor_of
        if origin not in have or have[origin].shape != spec.shape:
            origin = None
        norm = spec.role in ("norm_gain", "norm_bias")
        if new and (
            init == "zero"
            or (init == "copying_zeroL" and spec.last_linear)
            or (init == "copying_zeroN" and norm)
        ):
            weights = ZERO
        else:
            weights = INIT if origin is None else COPY
        state = ZERO
        if origin is not None:
            state = COPY if new and optimizer_state == "copy" else ZERO if new else kept
        rules[name] = TensorRule(weights, state, origin)
    return rules


def rules_of(
    expansion: ExpansionSection, source: ModelShape, target: ModelShape
) -> dict[str, TensorRule]:
    """The rules of a configured expansion (:func:`depth_map`)."""
    return depth_map(
        source,
        target,
        expansion.init,
        expansion.order,
        expansion.insert,
        expansion.optimizer_state,
        block_of(expansion),
    )


def new_tensors(expansion: ExpansionSection, source: ModelShape, target: ModelShape) -> list[str]:
    """The names of the tensors of the layers that an expansion adds."""
    copied, before = expansion.init.startswith("copying"), source.stacks()
    placing = expansion.order, expansion.insert, copied, block_of(expansion)
    kept = {
        (stack, place)
        for stack, kinds in target.stacks().items()
        for place in (survivors(before[stack], kinds, *placing) if before[stack] else [])
    }
    found = []
    for name in tensor_table(target):
        layer = layer_of(name)
        if layer is not None and layer not in kept:
            found.append(name)
    return found


def block_of(expansion: ExpansionSection) -> Block | None:
    """The configured block, which :func:`check_growth` has accepted."""
    return None if expansion.block is None else (expansion.block[0], expansion.block[1])


def check_depths(expansion: ExpansionSection, from_layers: int, field: str, whose: str) -> None:
    """Check that an expansion can start from ``from_layers``.

    Args:
        field: the name of the expansion in messages.
        whose: says whose layers these are, as in "the 2 layers before it".

    Raises:
        ConfigError: the target is not deeper, or there is nothing to copy.
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


def check_growth(
    expansion: ExpansionSection, source: ModelShape, target: ModelShape, field: str, whose: str
) -> None:
    """Check that an expansion can make ``target`` of ``source``: :func:`check_depths`, and that
    there is such a block of layers to copy.

    Raises:
        ConfigError: it cannot.
    """
    check_depths(expansion, source.num_layers, field, whose)
    block, name = expansion.block, f"{field}.block"
    if block is None:
        return
    if not expansion.init.startswith("copying"):
        raise ConfigError(
            f"{name}: got {block} with init {expansion.init}; accepted: none (a block is what "
            "copying, copying_zeroL and copying_zeroN copy)"
        )
    stacks = source.stacks()
    if len(stacks) != 1:
        raise ConfigError(
            f"{name}: got {block} for family {source.family}; accepted: none (its layers are in "
            f"{len(stacks)} stages)"
        )
    layers = source.num_layers
    if len(block) != 2 or not 0 <= block[0] < block[1] <= layers:
        raise ConfigError(
            f"{name}: got {block}; accepted: [first, last] with 0 <= first < last <= {layers}, the "
            f"layer{'s' * (layers != 1)} {whose} (last is not copied)"
        )
    ((_, before),) = stacks.items()
    ((_, after),) = target.stacks().items()
    for kind in dict.fromkeys(before):
        new = after.count(kind) - before.count(kind)
        if new and kind not in before[block[0] : block[1]]:
            first = before.index(kind)
            raise ConfigError(
                f"{name}: got {block}, which has no layer of the kind {kind!r} that {new} new "
                f"layer{'s' * (new != 1)} are of; accepted: a block with one of the layers "
                f"{first} to {first + before.count(kind) - 1}"
            )


def copied_from(rules: dict[str, TensorRule]) -> Callable[[Key], Key | None]:
    """A function that gives the source of a slot of a target tensor, and None where the slot is not
    copied."""

    def source_of(key: Key) -> Key | None:
        name, slot = key
        rule = rules[name]
        return (rule.source, slot) if rule.action(slot) == COPY and rule.source else None

    return source_of
