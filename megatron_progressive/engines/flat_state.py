"""The state of a flat optimizer, as pieces of global tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_progressive.optim.flat import Cut, Fragment
from megatron_progressive.reshard.boxes import MASTER, Piece, flat_range_boxes, scalar_piece, whole


def flat_pieces(
    cut: Cut, slot: str, value: torch.Tensor, start: int, replica: int = 0
) -> Iterator[Piece]:
    """The pieces of the flat range of a tensor that begins at ``start``."""
    shape = cut.spec.shape
    for box, low, high in flat_range_boxes(whole(shape), start, start + value.numel()):
        view = value[low - start : high - start].view(box.shape)
        yield Piece(cut.name, slot, shape, box, view, replica)


def slot_pieces(
    fragment: Fragment, rank: int, masters: bool, replica: int | None = None
) -> Iterator[Piece]:
    """The optimizer slots of one tensor on this rank.

    Args:
        rank: this rank's number, as the optimizer's cuts name ranks.
        masters: whether the fp32 weights that the optimizer updates are master weights.
        replica: this rank's number among those that hold the same; None where ranks hold different
            parts.
    """
    cut, slots = fragment.cut, dict(fragment.slots)
    if masters and slots:
        slots[MASTER] = fragment.weight
    for slot, value in slots.items():
        if value.dim() == 0:  # each rank with a part has the number
            number = list(cut.ranges).index(rank) if replica is None else replica
            yield scalar_piece(cut.name, slot, value, number, tied=False)
        else:
            yield from flat_pieces(cut, slot, value, cut.range_of(rank)[0], replica or 0)
