"""Where the layers of a shallow stack go in a deeper one: which are copied, and which survive.

Everything here is of lists of layer kinds. Layers of one kind stay in the places of that kind, so
each kind is arranged on its own.
"""

from __future__ import annotations

from collections.abc import Sequence

Block = tuple[int, int]
"""The first of the layers that are copied, and the one behind the last of them."""


def middle_block(trained: int, new: int) -> Block:
    """The block that ``insert: middle`` copies: the largest one in the middle of ``trained`` layers
    whose whole copies make up ``new`` layers and which leaves a layer on either side; all layers
    where there is no such block.

    So 11 layers that grow to 17 copy the 6 in their middle once (arXiv 2609.19107), and 4 that grow
    to 8 copy the 2 in their middle twice.
    """
    for size in range(min(trained - 2, new), 0, -1):
        if new % size == 0:
            first = (trained - size) // 2
            return first, first + size
    return 0, trained


def source_layers(
    source_kinds: Sequence[str],
    target_kinds: Sequence[str],
    order: str,
    insert: str = "bottom",
    block: Block | None = None,
) -> list[int]:
    """The source layer of each target layer where layers are copied: ABAB, AABB or ABBB.

    Layers are copied to layers of their kind, and everything applies to each kind on its own. All
    layers are copied, or those of a block: the layers below and above it have one place each, and
    what is left of the target is filled with the block in its order. Target layers of a kind that
    the source does not have take all source layers (of the block), in that order: what the two
    kinds have in common (attention and norms) is copied, the rest is new.

    Args:
        insert: ``middle`` takes :func:`middle_block` where there is no ``block``.
        block: the source layers to copy.

    Raises:
        ValueError: the order is unknown, or there is nothing to copy.
    """
    if not source_kinds:
        raise ValueError("copying needs a source layer")
    origins = [0] * len(target_kinds)
    for kind in set(target_kinds):
        own = [layer for layer, k in enumerate(source_kinds) if k == kind]
        targets = [layer for layer, k in enumerate(target_kinds) if k == kind]
        sources = own or list(range(len(source_kinds)))
        if block is not None:
            first, last = block
        elif insert == "middle" and own:
            one, behind = middle_block(len(own), len(targets) - len(own))
            first, last = own[one], own[behind - 1] + 1
        else:
            first, last = 0, len(source_kinds)
        copied = [layer for layer in sources if first <= layer < last]
        below = [layer for layer in own if layer < first]
        above = [layer for layer in own if layer >= last]
        places = len(targets) - len(below) - len(above)
        chosen = [*below, *(copied[i] for i in _ordered(len(copied), places, order)), *above]
        for target, layer in zip(targets, chosen, strict=True):
            origins[target] = layer
    return origins


def _ordered(count: int, places: int, order: str) -> list[int]:
    """Which of ``count`` layers each of ``places`` places has."""
    if not count and places:
        raise ValueError("copying needs a source layer")
    if order == "stack":
        return [place % count for place in range(places)]
    if order == "inter":
        return [place * count // places for place in range(places)]
    if order == "last":
        return [min(place, count - 1) for place in range(places)]
    raise ValueError(f"order {order!r}")


def survivors(
    source_kinds: Sequence[str],
    target_kinds: Sequence[str],
    order: str,
    insert: str,
    copied: bool,
    block: Block | None = None,
) -> list[int]:
    """The target layer that *is* each source layer, and keeps its optimizer state, in the order of
    source layers. Survivors of one kind keep their order, so that a model whose new layers do
    nothing computes what the source does.

    Without copying, new layers go below (``bottom``) or above (``top``) all trained ones of their
    kind, or between their lower and their upper half (``middle``). With copying, a source layer
    has several copies. The survivors are the copies of its kind that are the furthest up when new
    layers are inserted at the bottom, and the furthest down otherwise; those of a block copied in
    the middle lie below their copies.
    """
    alive = [0] * len(source_kinds)
    origins: list[int] = []
    if copied:
        origins = source_layers(source_kinds, target_kinds, order, insert, block)
    for kind in set(source_kinds):
        sources = [layer for layer, k in enumerate(source_kinds) if k == kind]
        targets = [layer for layer, k in enumerate(target_kinds) if k == kind]
        if copied:
            upward = insert != "bottom"
            waiting = iter(targets if upward else reversed(targets))
            for layer in sources if upward else reversed(sources):
                alive[layer] = next(place for place in waiting if origins[place] == layer)
        else:
            new = len(targets) - len(sources)
            kept = {"bottom": 0, "middle": len(sources) // 2, "top": len(sources)}[insert]
            for index, layer in enumerate(sources):  # those from `kept` on are above the new ones
                alive[layer] = targets[index if index < kept else index + new]
    return alive
