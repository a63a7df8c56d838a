"""The metadata of all ranks as arrays: which rank holds which box of which tensor.

This needs neither torch nor process groups, and stays small for thousands of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_progressive.reshard.boxes import Box, Key, PieceMeta

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8}
_DTYPES = list(DTYPE_BYTES)
AXES = 4  # most axes of a tensor; the rest of a row is padded with extent 1

_ROW = np.dtype(
    [
        ("key", "<i4"),
        ("axes", "i1"),
        ("dtype", "i1"),
        ("readable", "i1"),
        ("offset", "<i8", (AXES,)),
        ("extent", "<i8", (AXES,)),
    ]
)


@dataclass(frozen=True)
class PieceTable:
    """The metadata of some pieces as arrays, which ranks exchange."""

    keys: tuple[Key, ...]
    rows: np.ndarray = field(repr=False, compare=False)
    """One row for each piece, in the order of the pieces."""

    @staticmethod
    def of(pieces: Iterable[PieceMeta]) -> PieceTable:
        numbers: dict[Key, int] = {}
        rows = []
        for piece in pieces:
            box = piece.box
            axes = len(box.shape)
            rows.append(
                (
                    numbers.setdefault(piece.key, len(numbers)),
                    axes,
                    _DTYPES.index(piece.dtype),
                    piece.readable,
                    box.offset + (0,) * (AXES - axes),
                    box.shape + (1,) * (AXES - axes),
                )
            )
        return PieceTable(tuple(numbers), np.array(rows, _ROW))

    def to_bytes(self) -> bytes:
        header = json.dumps(self.keys).encode()
        return len(header).to_bytes(8, "little") + header + self.rows.tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> PieceTable:
        start = 8 + int.from_bytes(data[:8], "little")
        keys = tuple((name, slot) for name, slot in json.loads(data[8:start]))
        return PieceTable(keys, np.frombuffer(data, _ROW, offset=start))


Held = tuple[PieceTable, Sequence[int]]
"""Some pieces, and the ranks that hold exactly these; a rank may appear with several tables."""


class Side:
    """All pieces of all ranks in the old layout, or in the new one, grouped by (key, box)."""

    def __init__(self, held: Sequence[Held], readable_only: bool) -> None:
        numbers: dict[Key, int] = {}
        chunks, parts = [], []
        self._part_ranks = [np.asarray(ranks, np.int64) for _, ranks in held]
        for part, (table, _) in enumerate(held):
            mine = np.array([numbers.setdefault(k, len(numbers)) for k in table.keys], np.int32)
            rows = table.rows.copy()
            if len(rows):
                rows["key"] = mine[table.rows["key"]]
            chunks.append(rows)
            parts.append(np.full(len(rows), part, np.int32))
        rows = np.concatenate(chunks) if chunks else np.zeros(0, _ROW)
        part_of = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        if readable_only:
            kept = rows["readable"] == 1
            rows, part_of = rows[kept], part_of[kept]
        columns = [rows["extent"][:, a] for a in reversed(range(AXES))]
        columns += [rows["offset"][:, a] for a in reversed(range(AXES))]
        order = np.lexsort([part_of, *columns, rows["key"]])
        rows, part_of = rows[order], part_of[order]
        new = np.ones(len(rows), bool)
        new[1:] = (
            (rows["key"][1:] != rows["key"][:-1])
            | (rows["offset"][1:] != rows["offset"][:-1]).any(axis=1)
            | (rows["extent"][1:] != rows["extent"][:-1]).any(axis=1)
        )
        first = np.flatnonzero(new)
        self.groups = rows[first]
        """One row for each distinct (key, box), sorted."""
        self._first = np.append(first, len(rows))
        self._part_of = part_of
        self._holders: dict[bytes, np.ndarray] = {}
        self.keys = list(numbers)
        self._numbers = numbers
        self._start = np.searchsorted(self.groups["key"], np.arange(len(numbers) + 1))

    def of_key(self, key: Key) -> range:
        """The groups of one tensor's slot."""
        number = self._numbers.get(key)
        return range(0) if number is None else range(*map(int, self._start[number : number + 2]))

    def of_rank(self, rank: int) -> list[int]:
        """The groups that a rank holds."""
        parts = [part for part, ranks in enumerate(self._part_ranks) if (ranks == rank).any()]
        rows = np.flatnonzero(np.isin(self._part_of, np.array(parts, np.int32)))
        found: np.ndarray = np.unique(np.searchsorted(self._first, rows, side="right") - 1)
        return [int(group) for group in found]

    def holders(self, group: int) -> np.ndarray:
        """The ranks that hold a group, in ascending order."""
        parts = self._part_of[self._first[group] : self._first[group + 1]]
        known = self._holders.get(parts.tobytes())
        if known is None:
            known = np.unique(np.concatenate([self._part_ranks[part] for part in parts]))
            self._holders[parts.tobytes()] = known
        return known

    def only_holder(self) -> np.ndarray:
        """The one rank that holds each group, or -1 where there are several, as int64 [groups]."""
        lone = np.array([r[0] if len(r) == 1 else -1 for r in self._part_ranks], np.int64)
        single = np.diff(self._first) == 1
        found = np.full(len(self.groups), -1, np.int64)
        found[single] = lone[self._part_of[self._first[:-1][single]]]
        return found

    def dtype(self, group: int) -> str:
        return _DTYPES[int(self.groups[group]["dtype"])]

    def itemsizes(self) -> np.ndarray:
        """The number of bytes of an element of each group, as int64 [groups]."""
        sizes = np.array([DTYPE_BYTES[dtype] for dtype in _DTYPES], np.int64)
        found: np.ndarray = sizes[self.groups["dtype"]]
        return found

    def box(self, group: int) -> tuple[Key, Box]:
        row = self.groups[group]
        axes = int(row["axes"])
        offset = tuple(int(v) for v in row["offset"][:axes])
        shape = tuple(int(v) for v in row["extent"][:axes])
        return self.keys[row["key"]], Box(offset, shape)

    def overlapping(self, others: range, group: np.void) -> list[tuple[int, Box]]:
        """The groups among ``others`` that share elements with a row of either side, and what they
        share."""
        rows = self.groups[others.start : others.stop]
        low = np.maximum(rows["offset"], group["offset"])
        high = np.minimum(rows["offset"] + rows["extent"], group["offset"] + group["extent"])
        axes = int(group["axes"])
        return [
            (
                others.start + int(i),
                Box(
                    tuple(int(v) for v in low[i, :axes]),
                    tuple(int(v) for v in (high - low)[i, :axes]),
                ),
            )
            for i in np.flatnonzero((high > low).all(axis=1))
        ]
