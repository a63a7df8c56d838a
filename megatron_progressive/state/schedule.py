"""Who sends what to whom: one rank's own part of a reshard, from everybody's metadata.

Needs neither torch nor process groups. Every rank computes its own part only, in arrays, so
that thousands of ranks are no problem: the two ends of each message come to the same
conclusion because both follow the same rule on the same metadata.

The rule: a rank that holds a box of the source itself copies it; any other rank that needs it
gets it once, from one holder. Those that need the same box are dealt out over its holders in
turn, and the turn starts with another holder for each box.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_progressive.state.boxes import Box, Key, PieceMeta

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8}
_DTYPES = list(DTYPE_BYTES)
_AXES = 4  # most axes of a tensor; the rest of a row is padded with extent 1

_ROW = np.dtype(
    [
        ("key", "<i4"),
        ("axes", "i1"),
        ("dtype", "i1"),
        ("readable", "i1"),
        ("offset", "<i8", (_AXES,)),
        ("extent", "<i8", (_AXES,)),
    ]
)


class TransferError(RuntimeError):
    """A target box that no source covers, or whose type differs."""


@dataclass(frozen=True)
class PieceTable:
    """Metadata of some pieces as arrays: what ranks exchange."""

    keys: tuple[Key, ...]
    rows: np.ndarray = field(repr=False, compare=False)
    """One row a piece, in the order of the pieces."""

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
                    box.offset + (0,) * (_AXES - axes),
                    box.shape + (1,) * (_AXES - axes),
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
"""Pieces, and the ranks that hold exactly these (a rank may appear with several tables)."""


@dataclass(frozen=True)
class Move:
    """Part of a source piece that goes to part of a target piece."""

    source: tuple[Key, Box]
    target: tuple[Key, Box]
    box: Box
    nbytes: int


@dataclass(frozen=True)
class OwnPart:
    """One rank's part of a reshard. Both ends list a pair's moves in the same order."""

    local: list[Move]
    sends: dict[int, list[Move]]
    receives: dict[int, list[Move]]

    @property
    def bytes_sent(self) -> int:
        return sum(move.nbytes for moves in self.sends.values() for move in moves)

    @property
    def bytes_received(self) -> int:
        return sum(move.nbytes for moves in self.receives.values() for move in moves)


class Side:
    """All pieces of all ranks, old or new, grouped by (key, box)."""

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
        columns = [rows["extent"][:, a] for a in reversed(range(_AXES))]
        columns += [rows["offset"][:, a] for a in reversed(range(_AXES))]
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
        """Groups of one tensor's slot."""
        number = self._numbers.get(key)
        return range(0) if number is None else range(*map(int, self._start[number : number + 2]))

    def of_rank(self, rank: int) -> list[int]:
        """Groups that a rank holds."""
        parts = [part for part, ranks in enumerate(self._part_ranks) if (ranks == rank).any()]
        rows = np.flatnonzero(np.isin(self._part_of, np.array(parts, np.int32)))
        found: np.ndarray = np.unique(np.searchsorted(self._first, rows, side="right") - 1)
        return [int(group) for group in found]

    def holders(self, group: int) -> np.ndarray:
        """Ranks that hold a group, ascending."""
        parts = self._part_of[self._first[group] : self._first[group + 1]]
        known = self._holders.get(parts.tobytes())
        if known is None:
            known = np.unique(np.concatenate([self._part_ranks[part] for part in parts]))
            self._holders[parts.tobytes()] = known
        return known

    def only_holder(self) -> np.ndarray:
        """The one rank that holds each group, -1 where there are several: int64 [groups]."""
        lone = np.array([r[0] if len(r) == 1 else -1 for r in self._part_ranks], np.int64)
        single = np.diff(self._first) == 1
        found = np.full(len(self.groups), -1, np.int64)
        found[single] = lone[self._part_of[self._first[:-1][single]]]
        return found

    def box(self, group: int) -> tuple[Key, Box]:
        row = self.groups[group]
        axes = int(row["axes"])
        offset = tuple(int(v) for v in row["offset"][:axes])
        shape = tuple(int(v) for v in row["extent"][:axes])
        return self.keys[row["key"]], Box(offset, shape)

    def overlapping(self, others: range, group: np.void) -> list[tuple[int, Box]]:
        """Groups among ``others`` that share elements with a row of either side; the shares."""
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


class Schedule:
    """A reshard from the pieces of ``sources`` to those of ``targets``.

    Args:
        sources, targets: everybody's metadata.
        source_of: the source tensor of a target tensor; None where it is not copied.
    """

    def __init__(
        self,
        sources: Sequence[Held],
        targets: Sequence[Held],
        source_of: Callable[[Key], Key | None],
    ) -> None:
        self.sources = Side(sources, readable_only=True)
        self.targets = Side(targets, readable_only=False)
        self._source_of = source_of
        self._needing: dict[tuple[int, int], np.ndarray] = {}
        self._fed: dict[Key, list[Key]] = defaultdict(list)
        for key in self.targets.keys:
            source = source_of(key)
            if source is not None:
                self._fed[source].append(key)

    def own_part(self, rank: int) -> OwnPart:
        """What ``rank`` copies, sends and receives.

        Raises:
            TransferError: a target piece of this rank that the sources do not cover, or that
                has another type.
        """
        local: list[Move] = []
        sends: dict[int, list[Move]] = defaultdict(list)
        receives: dict[int, list[Move]] = defaultdict(list)
        for wanted in self.targets.of_rank(rank):
            for held, share, owner in self._suppliers(wanted, rank):
                move = self._move(held, wanted, share)
                (local if owner == rank else receives[owner]).append(move)
        for held in self.sources.of_rank(rank):
            key, _ = self.sources.box(held)
            for fed in self._fed[key]:
                for wanted, share in self.targets.overlapping(
                    self.targets.of_key(fed), self.sources.groups[held]
                ):
                    needing, owners = self._owners(held, wanted)
                    for peer in needing[owners == rank]:
                        sends[int(peer)].append(self._move(held, wanted, share))
        for moves in (*sends.values(), *receives.values()):
            moves.sort(key=lambda m: (m.target[0], m.target[1].offset, m.box.offset))
        return OwnPart(local, dict(sends), dict(receives))

    def bytes_by_rank(self, world: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes that each rank sends and receives, int64 [world] each: all own parts at once.

        Raises:
            TransferError: a target that the sources do not cover.
        """
        sent, received = np.zeros(world, np.int64), np.zeros(world, np.int64)
        held, wanted, nbytes = self._pairs()
        owner_of = self.sources.only_holder()[held]
        reader_of = self.targets.only_holder()[wanted]
        single = (owner_of >= 0) & (reader_of >= 0)  # nearly all: shard to shard
        crossing = single & (owner_of != reader_of)
        np.add.at(sent, owner_of[crossing], nbytes[crossing])
        np.add.at(received, reader_of[crossing], nbytes[crossing])
        for source, target, size in zip(
            held[~single].tolist(), wanted[~single].tolist(), nbytes[~single], strict=True
        ):
            needing, owners = self._owners(source, target)
            received[needing] += size
            np.add.at(sent, owners, size)
        return sent, received

    def _pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source group, target group, bytes that they share), of all that overlap."""
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for key in self.targets.keys:
            source = self._source_of(key)
            if source is None:
                continue
            froms, tos = self.sources.of_key(source), self.targets.of_key(key)
            rows = self.sources.groups[froms.start : froms.stop]
            fed = self.targets.groups[tos.start : tos.stop]
            low, first = rows["offset"], fed["offset"]
            high, last = low + rows["extent"], first + fed["extent"]
            # Sources are sorted by first row: those that reach a target's rows are a range.
            reach = np.maximum.accumulate(high[:, 0])
            begin = np.searchsorted(reach, first[:, 0], side="right")
            end = np.searchsorted(low[:, 0], last[:, 0], side="left")
            counts = np.maximum(end - begin, 0)
            target = np.repeat(np.arange(len(fed)), counts)
            ahead = np.repeat(np.cumsum(counts) - counts, counts)
            index = np.arange(len(target)) - ahead + begin[target]
            extent = np.minimum(high[index], last[target]) - np.maximum(low[index], first[target])
            elements = np.maximum(extent, 0).prod(axis=1)
            if elements.sum() != fed["extent"].prod(axis=1).sum():
                raise TransferError(f"{'/'.join(key)}: the sources do not cover it")
            kept = elements > 0
            itemsize = DTYPE_BYTES[_DTYPES[rows["dtype"][0]]]
            found.append(
                (index[kept] + froms.start, target[kept] + tos.start, elements[kept] * itemsize)
            )
        if not found:
            return (np.zeros(0, np.int64),) * 3
        held, wanted, nbytes = (np.concatenate(part) for part in zip(*found, strict=True))
        return held, wanted, nbytes

    def _suppliers(self, wanted: int, rank: int) -> list[tuple[int, Box, int]]:
        """(source group, share, owner) of everything that fills one target piece."""
        key, box = self.targets.box(wanted)
        source = self._source_of(key)
        if source is None:
            return []
        row, found, covered = self.targets.groups[wanted], [], 0
        for held, share in self.sources.overlapping(self.sources.of_key(source), row):
            covered += share.numel
            if self.sources.groups[held]["dtype"] != row["dtype"]:
                types = [_DTYPES[r["dtype"]] for r in (self.sources.groups[held], row)]
                raise TransferError(f"{'/'.join(key)}: {types[0]} to {types[1]}")
            if rank in self.sources.holders(held):
                owner = rank
            else:
                needing, owners = self._owners(held, wanted)
                owner = int(owners[np.searchsorted(needing, rank)])
            found.append((held, share, owner))
        if covered != box.numel:
            raise TransferError(
                f"{'/'.join(key)}: {covered} of {box.numel} elements of {box} are in the source "
                f"({'/'.join(source)})"
            )
        return found

    def _owners(self, held: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """Ranks that need a source group for a target group, and who sends it to each."""
        holders = self.sources.holders(held)
        wanting = self.targets.holders(wanted)
        needing = self._needing.get((id(holders), id(wanting)))  # the sides keep both
        if needing is None:
            needing = wanting[~np.isin(wanting, holders, assume_unique=True)]
            self._needing[id(holders), id(wanting)] = needing
        return needing, holders[(held + np.arange(len(needing))) % len(holders)]

    def _move(self, held: int, wanted: int, share: Box) -> Move:
        itemsize = DTYPE_BYTES[_DTYPES[self.sources.groups[held]["dtype"]]]
        return Move(self.sources.box(held), self.targets.box(wanted), share, share.numel * itemsize)
