"""Who sends what to whom: one rank's own part of a reshard, from everybody's metadata.

This needs neither torch nor process groups. Every rank computes only its own part, in arrays, so
that thousands of ranks are no problem. The two ends of each message come to the same conclusion
because both follow the same rule on the same metadata.

The rule: a rank that holds a box of the source itself copies it; any other rank that needs elements
of it gets each of them once, from one holder, however many of its target tensors they go to (a
layer that is copied to twelve travels once). The ranks that need a box are dealt out over its
holders in turn, and the turn starts with another holder for each box.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_progressive.reshard.boxes import Box, Key, disjoint
from megatron_progressive.reshard.metadata import AXES, DTYPE_BYTES, Held, Side

_NEED = np.dtype(
    [("held", "<i8"), ("reader", "<i8"), ("offset", "<i8", (AXES,)), ("extent", "<i8", (AXES,))]
)
"""The need of one rank for a share of a source group."""
_NOBODY = np.zeros(0, np.int64)


class TransferError(RuntimeError):
    """No source covers a target box, or the source has another type."""


@dataclass(frozen=True)
class Move:
    """A part of a source piece that goes to one rank."""

    source: tuple[Key, Box]
    box: Box
    dtype: str
    targets: tuple[tuple[Key, Box], ...] = field(default=(), compare=False)
    """The pieces of the receiving rank that take what they have in common with ``box``."""

    @property
    def nbytes(self) -> int:
        return self.box.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class OwnPart:
    """One rank's part of a reshard. Both ends of a pair list the pair's moves in the same order."""

    local: list[Move]
    sends: dict[int, list[Move]]
    receives: dict[int, list[Move]]

    @property
    def bytes_sent(self) -> int:
        return sum(move.nbytes for moves in self.sends.values() for move in moves)

    @property
    def bytes_received(self) -> int:
        return sum(move.nbytes for moves in self.receives.values() for move in moves)


Share = tuple[int, Box]
"""A group of one side, and the box that it has in common with a group of the other side."""


class Schedule:
    """A reshard from the pieces of ``sources`` to those of ``targets``.

    Args:
        sources, targets: the metadata of all ranks in the old and in the new layout.
        source_of: gives the source tensor of a target tensor, and None where it is not copied.
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
        self._lacking: dict[tuple[int, frozenset[int]], np.ndarray] = {}
        self._fed: dict[Key, list[Key]] = defaultdict(list)
        for key in self.targets.keys:
            source = source_of(key)
            if source is not None:
                self._fed[source].append(key)

    def own_part(self, rank: int) -> OwnPart:
        """What ``rank`` copies for itself, sends and receives.

        Raises:
            TransferError: the sources do not cover a target piece of this rank, or have another
                type.
        """
        local: list[Move] = []
        missing: dict[int, list[Share]] = defaultdict(list)
        for wanted in self.targets.of_rank(rank):
            for held, share in self._suppliers(wanted):
                if rank in self.sources.holders(held):
                    local += self._moves(held, [(wanted, share)])
                else:
                    missing[held].append((wanted, share))
        receives: dict[int, list[Move]] = defaultdict(list)
        for held, shares in missing.items():
            receives[self._owner(held, rank)] += self._moves(held, shares)
        sends: dict[int, list[Move]] = defaultdict(list)
        for held in self.sources.of_rank(rank):
            fed = self._fed_by(held)
            readers = self._lacking_of(held, [w for w, _ in fed])
            served = readers[self._owners(held, len(readers)) == rank]
            wanting: dict[int, list[Share]] = defaultdict(list)
            for wanted, share in fed if len(served) else ():
                for peer in np.intersect1d(served, self.targets.holders(wanted)).tolist():
                    wanting[peer].append((wanted, share))
            for peer, shares in wanting.items():
                sends[peer] += self._moves(held, shares)
        for moves in (*sends.values(), *receives.values()):
            moves.sort(key=lambda m: (m.source[0], m.source[1].offset, m.box.offset))
        return OwnPart(local, dict(sends), dict(receives))

    def bytes_by_rank(self, world: int) -> tuple[np.ndarray, np.ndarray]:
        """The bytes that each rank sends and receives, as int64 [world] each, computed for all
        ranks at once.

        Raises:
            TransferError: the sources do not cover a target.
        """
        sent, received = np.zeros(world, np.int64), np.zeros(world, np.int64)
        needs = self._needs()
        if not len(needs):
            return sent, received
        needs = needs[np.lexsort([needs["reader"], needs["held"]])]
        new = np.ones(len(needs), bool)
        new[1:] = (needs["held"][1:] != needs["held"][:-1]) | (
            needs["reader"][1:] != needs["reader"][:-1]
        )
        first, pair_of = np.flatnonzero(new), np.cumsum(new) - 1
        elements = needs["extent"][first].prod(axis=1)
        lead = needs[first][pair_of]
        other = (needs["offset"] != lead["offset"]) | (needs["extent"] != lead["extent"])
        ends = np.append(first, len(needs))
        for pair in np.unique(pair_of[other.any(axis=1)]).tolist():  # not all the same share
            rows = needs[ends[pair] : ends[pair + 1]]
            boxes = [Box(tuple(r["offset"].tolist()), tuple(r["extent"].tolist())) for r in rows]
            elements[pair] = sum(box.numel for box in disjoint(boxes))
        held, reader = needs["held"][first], needs["reader"][first]
        nbytes = elements * self.sources.itemsizes()[held]
        np.add.at(received, reader, nbytes)
        owner = self.sources.only_holder()[held]
        for start in np.flatnonzero((owner < 0) & np.append(True, held[1:] != held[:-1])).tolist():
            count = int(np.searchsorted(held, held[start], side="right")) - start
            owner[start : start + count] = self._owners(int(held[start]), count)
        np.add.at(sent, owner, nbytes)
        return sent, received

    def _needs(self) -> np.ndarray:
        """Everything that ranks need and do not hold, as source groups, reading ranks and
        shares."""
        held, wanted, low, extent = self._pairs()
        owner_of = self.sources.only_holder()[held]
        reader_of = self.targets.only_holder()[wanted]
        lone = (owner_of >= 0) & (reader_of >= 0)  # nearly all: shard to shard
        several = np.flatnonzero(~lone)
        lacking = [
            self._lacking_of(source, [target])
            for source, target in zip(held[several].tolist(), wanted[several].tolist(), strict=True)
        ]
        crossing = np.flatnonzero(lone & (owner_of != reader_of))
        pairs = np.concatenate([crossing, np.repeat(several, [len(ranks) for ranks in lacking])])
        needs = np.zeros(len(pairs), _NEED)
        needs["held"], needs["offset"], needs["extent"] = held[pairs], low[pairs], extent[pairs]
        needs["reader"] = np.concatenate([reader_of[crossing], *lacking])
        return needs

    def _pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All pairs of a source group and a target group that overlap, with the offset and the
        extent of what they share."""
        found: list[tuple[np.ndarray, ...]] = []
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
            begins = np.maximum(low[index], first[target])
            extent = np.maximum(np.minimum(high[index], last[target]) - begins, 0)
            elements = extent.prod(axis=1)
            if elements.sum() != fed["extent"].prod(axis=1).sum():
                raise TransferError(f"{'/'.join(key)}: the sources do not cover it")
            kept = elements > 0
            found.append((index[kept] + froms.start, target[kept] + tos.start, begins[kept],
                          extent[kept]))  # fmt: skip
        if not found:
            none, nowhere = np.zeros(0, np.int64), np.zeros((0, AXES), np.int64)
            return none, none, nowhere, nowhere
        held, wanted, begins, extent = (np.concatenate(part) for part in zip(*found, strict=True))
        return held, wanted, begins, extent

    def _suppliers(self, wanted: int) -> list[Share]:
        """The source groups of everything that fills one target piece."""
        key, box = self.targets.box(wanted)
        source = self._source_of(key)
        if source is None:
            return []
        found = self.sources.overlapping(self.sources.of_key(source), self.targets.groups[wanted])
        for held, _ in found:
            types = self.sources.dtype(held), self.targets.dtype(wanted)
            if types[0] != types[1]:
                raise TransferError(f"{'/'.join(key)}: {types[0]} to {types[1]}")
        covered = sum(share.numel for _, share in found)
        if covered != box.numel:
            raise TransferError(
                f"{'/'.join(key)}: {covered} of {box.numel} elements of {box} are in the source "
                f"({'/'.join(source)})"
            )
        return found

    def _fed_by(self, held: int) -> list[Share]:
        """The target groups that a source group fills in part."""
        key, _ = self.sources.box(held)
        row = self.sources.groups[held]
        return [
            fed
            for target in self._fed[key]
            for fed in self.targets.overlapping(self.targets.of_key(target), row)
        ]

    def _lacking_of(self, held: int, wanted: Sequence[int]) -> np.ndarray:
        """The ranks that hold any of some target groups but not a source group, in ascending
        order."""
        holders = self.sources.holders(held)
        wanting = {id(ranks): ranks for ranks in map(self.targets.holders, wanted)}
        key = id(holders), frozenset(wanting)  # the sides keep all of them
        lacking = self._lacking.get(key)
        if lacking is None:
            readers = np.unique(np.concatenate([_NOBODY, *wanting.values()]))
            lacking = readers[~np.isin(readers, holders, assume_unique=True)]
            self._lacking[key] = lacking
        return lacking

    def _owner(self, held: int, rank: int) -> int:
        """The rank that sends a source group's elements to a rank that needs some of them."""
        holders = self.sources.holders(held)
        if len(holders) == 1:  # nearly always, and quick: no need to know the other readers
            return int(holders[0])
        readers = self._lacking_of(held, [wanted for wanted, _ in self._fed_by(held)])
        return int(self._owners(held, len(readers))[np.searchsorted(readers, rank)])

    def _owners(self, held: int, readers: int) -> np.ndarray:
        """The rank that sends a source group's elements to each of so many readers."""
        holders = self.sources.holders(held)
        return holders[(held + np.arange(readers)) % len(holders)]

    def _moves(self, held: int, shares: Sequence[Share]) -> list[Move]:
        """The parts of a source group that one rank gets, in which each element occurs once."""
        return [
            Move(
                self.sources.box(held),
                box,
                self.sources.dtype(held),
                tuple(self.targets.box(w) for w, share in shares if share.intersect(box)),
            )
            for box in disjoint(share for _, share in shares)
        ]
