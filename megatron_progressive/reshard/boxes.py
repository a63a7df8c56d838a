"""Boxes of global tensors: the one description of "who holds what" on which everything else is
built.

A *piece* is this rank's view of one box of one slot of one global tensor. Slots are ``param`` (the
weight that the model computes with), ``master`` (its fp32 copy, where the precision keeps one) and
the optimizer's own (``momentum``, ``exp_avg``, ``exp_avg_sq``, ``step``). A ZeRO partition, which
cuts a flattened tensor anywhere, is a few boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # planning describes pieces without loading torch
    import torch

Key = tuple[str, str]
"""The global name of a tensor, and a slot."""

PARAM = "param"
MASTER = "master"
WEIGHT_SLOTS = (PARAM, MASTER)
"""The slots that hold the weight itself; every other slot is optimizer state."""


@dataclass(frozen=True)
class Box:
    """A rectangle of a global tensor: its first element and its extent along each axis."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The rectangle that this box and another have in common; None where they have none."""
        offset, shape = [], []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            low, high = max(a, b), min(a + n, b + m)
            if low >= high:
                return None
            offset.append(low)
            shape.append(high - low)
        return Box(tuple(offset), tuple(shape))

    def minus(self, other: Box) -> list[Box]:
        """What of this box lies outside of another one, as boxes that do not overlap, at most two
        for each axis."""
        common = self.intersect(other)
        if common is None:
            return [self]
        parts = []
        offset, shape = list(self.offset), list(self.shape)
        for axis, (low, extent) in enumerate(zip(common.offset, common.shape, strict=True)):
            end = offset[axis] + shape[axis]
            for start, stop in ((offset[axis], low), (low + extent, end)):
                if start < stop:
                    outside = Box(tuple(offset), tuple(shape))
                    parts.append(outside.along(axis, start, stop - start))
            offset[axis], shape[axis] = low, extent
        return parts

    def along(self, axis: int, offset: int, extent: int) -> Box:
        """This box with another range along one axis."""
        return Box(
            (*self.offset[:axis], offset, *self.offset[axis + 1 :]),
            (*self.shape[:axis], extent, *self.shape[axis + 1 :]),
        )

    def slices_within(self, outer: Box) -> tuple[slice, ...]:
        """The index of this box in a tensor that holds ``outer``."""
        return tuple(
            slice(a - b, a - b + n)
            for a, n, b in zip(self.offset, self.shape, outer.offset, strict=True)
        )

    def split(self, most: int) -> Iterator[Box]:
        """This box in parts of at most ``most`` elements each, in row-major order."""
        if self.numel <= most:
            yield self
            return
        axis = next(i for i, n in enumerate(self.shape) if n > 1)
        inner = math.prod(self.shape[axis + 1 :])
        rows = max(1, most // inner)
        for start in range(0, self.shape[axis], rows):
            extent = min(rows, self.shape[axis] - start)
            yield from self.along(axis, self.offset[axis] + start, extent).split(most)


def disjoint(boxes: Iterable[Box]) -> list[Box]:
    """Boxes that cover the elements of some boxes once each; of two that overlap the larger stays
    whole."""
    found: list[Box] = []
    for box in sorted(set(boxes), key=lambda b: (-b.numel, b.offset, b.shape)):
        rest = [box]
        for taken in found:
            rest = [part for piece in rest for part in piece.minus(taken)]
        found += rest
    return found


def whole(shape: Sequence[int]) -> Box:
    """The box that covers a whole tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def flat_range_boxes(box: Box, start: int, end: int) -> list[tuple[Box, int, int]]:
    """The flat range [start, end) of a row-major tensor that holds ``box``, as boxes.

    Returns: (box, first, last), in order, where [first, last) is the flat range that the box takes.
    There are at most 2 n - 1 boxes for n axes, and each is contiguous in the flat tensor.
    """
    boxes: list[tuple[Box, int, int]] = []

    def descend(offset: tuple[int, ...], axis: int, low: int, high: int, base: int) -> None:
        """Cover the flat range [low, high) of the part of the box below ``offset``."""
        inner = math.prod(box.shape[axis + 1 :])
        first, last = low // inner, -(-high // inner)

        def emit(row: int, rows: int) -> None:
            place = tuple(
                o + d for o, d in zip(box.offset[: axis + 1], (*offset, row), strict=True)
            )
            extent = (1,) * axis + (rows,) + box.shape[axis + 1 :]
            begin = base + row * inner
            boxes.append((Box(place + box.offset[axis + 1 :], extent), begin, begin + rows * inner))

        row = first
        if low % inner:  # a partial first row
            stop = min(high, (first + 1) * inner)
            descend((*offset, row), axis + 1, low - row * inner, stop - row * inner,
                    base + row * inner)  # fmt: skip
            row += 1
        full_end = high // inner
        if full_end > row:
            emit(row, full_end - row)
            row = full_end
        if row < last and high > row * inner and high % inner:  # a partial last row
            descend((*offset, row), axis + 1, 0, high - row * inner, base + row * inner)

    if start < end:
        descend((), 0, start, end, 0)
    return boxes


@dataclass(frozen=True)
class Piece:
    """One box of one slot of a global tensor, as a view that this rank may read and write."""

    name: str
    slot: str
    global_shape: tuple[int, ...]
    box: Box
    data: torch.Tensor = field(repr=False, compare=False)
    replica: int = 0
    """0 on exactly one of the ranks that hold this box, which is the rank that saves it."""
    tied_copy: bool = False
    """Whether it is the LM head's copy of a tied embedding on the last pipeline stage. Such a piece
    is written like any other and never read, since its optimizer may cut it at other places than
    the embedding's."""

    def __post_init__(self) -> None:
        if tuple(self.data.shape) != self.box.shape:
            raise ValueError(f"{self.name}/{self.slot}: {tuple(self.data.shape)} is not {self.box}")

    @property
    def key(self) -> Key:
        return self.name, self.slot

    @property
    def meta(self) -> PieceMeta:
        """What other ranks know of this piece."""
        dtype = str(self.data.dtype).removeprefix("torch.")
        return PieceMeta(self.key, self.box, dtype, not self.tied_copy)

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()


@dataclass(frozen=True)
class PieceMeta:
    """What other ranks know of a piece of this rank."""

    key: Key
    box: Box
    dtype: str
    """The name of its type: ``float32``, ``bfloat16``, ..."""
    readable: bool = True
    """Whether other ranks may copy from it; they may not from a tied head's copy."""


@dataclass(frozen=True)
class ShardedState:
    """All pieces of state that one rank holds."""

    pieces: list[Piece]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def scalar_piece(name: str, slot: str, value: torch.Tensor, replica: int, tied: bool) -> Piece:
    """A number that belongs to a tensor, such as Adam's step, as a global tensor of shape (1,)."""
    return Piece(name, slot, (1,), whole((1,)), value.view(1), replica, tied)
