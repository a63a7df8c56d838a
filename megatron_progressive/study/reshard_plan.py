"""Bytes that every rank sends and receives at an expansion, without processes or data.

Takes the pieces of all ranks before and after from :mod:`.engines.partitions`, what feeds what
from the depth map, and intersects boxes. Exact; thousands of ranks take seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_progressive.config import RunConfig
from megatron_progressive.engines.partitions import Held, held_pieces
from megatron_progressive.expansion.depth_map import COPY, depth_map
from megatron_progressive.models import model_shape, tensor_table
from megatron_progressive.runtime.layout import make_layout
from megatron_progressive.state.boxes import WEIGHT_SLOTS, Box, Key

Ints = NDArray[np.int64]

_ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ReshardBytes:
    """Bytes of one expansion, by rank: int64 [world] each."""

    received: Ints
    """From other ranks: all that a rank is to hold, is copied, and it does not hold already."""
    sent: Ints
    """To other ranks, each missing box by one of those that hold it, in turn."""
    least: int
    """Fewest bytes that can cross between ranks, in all: what each rank misses, once."""

    def seconds(self, gb_per_s: float) -> float:
        """Time of the exchange where every rank sends and receives at ``gb_per_s`` (1e9 bytes
        per second, each way, both at once): that of the busiest rank."""
        return max(int(self.received.max()), int(self.sent.max())) / (gb_per_s * 1e9)


def reshard_bytes(config: RunConfig, index: int, world: int) -> ReshardBytes:
    """Bytes that move at expansion ``index`` of ``config`` on ``world`` ranks.

    Raises:
        ConfigError: a layout that the ranks do not divide into.
        ValueError: a target that is copied, but that the source does not hold.
    """
    expansion = config.expansion[index]
    depth = config.expansion[index - 1].to_layers if index else None
    sides = [
        held_pieces(
            shape,
            config.optim,
            config.train.precision,
            make_layout(config.parallel_after(phase), world),
        )
        for phase, shape in (
            (index, model_shape(config, depth)),
            (index + 1, model_shape(config, expansion.to_layers)),
        )
    ]
    rules = depth_map(
        tensor_table(model_shape(config, expansion.to_layers)),
        model_shape(config, depth).num_layers,
        expansion.to_layers,
        expansion.init,
        expansion.order,
        expansion.insert,
        expansion.optimizer_state,
    )

    def source_of(key: Key) -> Key | None:
        rule = rules[key[0]]
        action = rule.weights if key[1] in WEIGHT_SLOTS else rule.state
        return (rule.source, key[1]) if action == COPY and rule.source is not None else None

    # Rows of a target: box, list that has it, bytes of an element; by the tensor that feeds it.
    wanted: dict[Key, list[tuple[Box, int, int]]] = defaultdict(list)
    receivers: list[Ints] = []
    for pieces, ranks in sides[1]:
        for piece in pieces:
            source = source_of(piece.key)
            if source is not None:
                wanted[source].append((piece.box, len(receivers), _ITEMSIZE[piece.dtype]))
        receivers.append(np.asarray(ranks))
    sources = _Sources(sides[0], wanted)
    parts = [_shared_bytes(sources.boxes[key], rows, key) for key, rows in wanted.items()]
    return _totals(sources.holders, receivers, parts, world)


class _Sources:
    """Distinct source boxes of the tensors that feed something, and who holds each.

    The distinct boxes of one tensor do not overlap: ranks hold the same box or disjoint ones
    (a tied head's copy, which may be cut elsewhere, is not readable).
    """

    def __init__(self, held: Iterable[Held], keys: Iterable[Key]) -> None:
        lists_of: dict[Key, dict[Box, list[int]]] = {key: {} for key in keys}
        ranks: list[Sequence[int]] = []
        for pieces, holders in held:
            for piece in pieces:
                if piece.readable and piece.key in lists_of:
                    lists_of[piece.key].setdefault(piece.box, []).append(len(ranks))
            ranks.append(holders)
        numbers: dict[tuple[int, ...], int] = {}
        self.boxes: dict[Key, list[tuple[Box, int]]] = {
            key: [
                (box, numbers.setdefault(tuple(lists), len(numbers)))
                for box, lists in boxes.items()
            ]
            for key, boxes in lists_of.items()
        }
        """(box, number of its set of holders) by tensor."""
        self.holders: list[Ints] = [
            np.unique(np.concatenate([np.asarray(ranks[i]) for i in lists])) for lists in numbers
        ]
        """Global ranks of each set."""


def _corners(boxes: Sequence[Box]) -> tuple[Ints, Ints]:
    """First and last corner (exclusive): int64 [boxes, axes] each."""
    first = np.array([box.offset for box in boxes], dtype=np.int64)
    return first, first + np.array([box.shape for box in boxes], dtype=np.int64)


def _shared_bytes(
    sources: list[tuple[Box, int]], targets: list[tuple[Box, int, int]], key: Key
) -> Ints:
    """What each target box takes of each source box: int64 [pairs, 3] of (set of holders,
    target list, bytes)."""
    if not sources:
        raise ValueError(f"{'/'.join(key)}: copied at the expansion, but no rank holds it")
    low, high = _corners([box for box, _ in sources])
    order = np.argsort(low[:, 0], kind="stable")
    low, high = low[order], high[order]
    holders = np.array([number for _, number in sources])[order]
    first, last = _corners([box for box, _, _ in targets])
    lists = np.array([number for _, number, _ in targets])
    itemsize = np.array([size for _, _, size in targets])
    # Source boxes in the order of their first row: those that reach a target's rows are in
    # [begin, end), from the first whose predecessors all stop before it.
    begin = np.searchsorted(np.maximum.accumulate(high[:, 0]), first[:, 0], side="right")
    end = np.searchsorted(low[:, 0], last[:, 0], side="left")
    counts = np.maximum(end - begin, 0)
    target = np.repeat(np.arange(len(targets)), counts)
    source = np.arange(len(target)) - np.repeat(np.cumsum(counts) - counts, counts) + begin[target]
    extent = np.minimum(high[source], last[target]) - np.maximum(low[source], first[target])
    elements = np.prod(np.maximum(extent, 0), axis=1)
    if elements.sum() != np.prod(last - first, axis=1).sum():
        raise ValueError(f"{'/'.join(key)}: the source's boxes do not cover it")
    keep = elements > 0
    target, source = target[keep], source[keep]
    return np.stack([holders[source], lists[target], elements[keep] * itemsize[target]], axis=1)


def _totals(
    holders: list[Ints], receivers: list[Ints], parts: list[Ints], world: int
) -> ReshardBytes:
    """Per rank: of every (holders, receivers, bytes), the receivers that are no holders get the
    bytes, each from the holder whose turn it is."""
    received, sent = np.zeros(world, np.int64), np.zeros(world, np.int64)
    rows = np.concatenate([*parts, np.zeros((0, 3), np.int64)])
    pair = rows[:, 0] * len(receivers) + rows[:, 1]
    order = np.argsort(pair, kind="stable")
    pairs, starts = np.unique(pair[order], return_index=True)
    sizes = np.add.reduceat(rows[order, 2], starts) if len(pairs) else np.zeros(0, np.int64)
    owners, lists = np.divmod(pairs, len(receivers))
    owner_rank, list_rank = _one_rank(holders)[owners], _one_rank(receivers)[lists]
    # Nearly all pairs are of one rank and one rank: shard to shard.
    crossing = (owner_rank >= 0) & (list_rank >= 0) & (owner_rank != list_rank)
    np.add.at(sent, owner_rank[crossing], sizes[crossing])
    np.add.at(received, list_rank[crossing], sizes[crossing])
    # From shards to weights that many ranks hold: all of a list at once.
    spread = np.flatnonzero((owner_rank >= 0) & (list_rank < 0))
    spread = spread[np.argsort(lists[spread], kind="stable")]
    for part in np.split(spread, np.flatnonzero(np.diff(lists[spread])) + 1):
        if not len(part):
            continue
        ranks, origin = receivers[lists[part[0]]], owner_rank[part]
        own = np.isin(origin, ranks)
        received[ranks] += sizes[part].sum()
        np.subtract.at(received, origin[own], sizes[part][own])
        np.add.at(sent, origin, sizes[part] * (len(ranks) - own))
    rest = owner_rank < 0
    turns = [0] * len(holders)
    holds = np.zeros(world, bool)
    for owner, receiver, nbytes in zip(owners[rest], lists[rest], sizes[rest], strict=True):
        ranks = holders[owner]
        holds[ranks] = True
        missing = receivers[receiver][~holds[receivers[receiver]]]
        holds[ranks] = False
        received[missing] += nbytes
        turn = turns[owner] + np.arange(len(missing))
        np.add.at(sent, ranks[turn % len(ranks)], nbytes)
        turns[owner] += len(missing)
    return ReshardBytes(received, sent, int(received.sum()))


def _one_rank(sets: list[Ints]) -> Ints:
    """The rank of each set of one, -1 for larger ones."""
    return np.array([int(ranks[0]) if len(ranks) == 1 else -1 for ranks in sets], dtype=np.int64)
