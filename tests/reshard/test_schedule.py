"""The reshard schedule: exact on small random cases, small and quick for thousands of ranks."""

from __future__ import annotations

import random
import re
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from megatron_progressive import config as configuration
from megatron_progressive.engines.partitions import held_pieces
from megatron_progressive.models import ModelShape, model_shape
from megatron_progressive.reshard.boxes import Box, Key, PieceMeta, flat_range_boxes, whole
from megatron_progressive.reshard.metadata import Held, PieceTable
from megatron_progressive.reshard.schedule import Schedule, TransferError
from megatron_progressive.runtime.layout import Layout

SLOTS = ("param", "master")


def random_side(rng: random.Random, shapes: dict[str, tuple[int, ...]], world: int) -> list[Held]:
    """Each tensor cut by rows, columns or flat ranges, with replicas on random ranks."""
    pieces: list[list[PieceMeta]] = [[] for _ in range(world)]
    for name, shape in shapes.items():
        for slot in SLOTS:
            total = int(np.prod(shape))
            cuts = sorted({0, total, *rng.choices(range(total + 1), k=rng.randint(0, 3))})
            kind = rng.choice(["whole", "flat", "rows"])
            boxes = [whole(shape)]
            if kind == "flat":
                boxes = [b for low, high in pairwise(cuts)
                         for b, _, _ in flat_range_boxes(whole(shape), low, high)]  # fmt: skip
            elif kind == "rows":
                boxes = [Box((r, *(0,) * (len(shape) - 1)), (1, *shape[1:]))
                         for r in range(shape[0])]  # fmt: skip
            for box in boxes:
                for rank in rng.sample(range(world), rng.randint(1, world)):
                    pieces[rank].append(PieceMeta((name, slot), box, "float32"))
    return [(PieceTable.of(p), [rank]) for rank, p in enumerate(pieces)]


Element = tuple[str, str, int]
"""(name, slot, flat element)."""


def elements(held: list[Held], world: int) -> list[set[Element]]:
    """What each rank holds."""
    out: list[set[Element]] = [set() for _ in range(world)]
    for table, ranks in held:
        for row in table.rows:
            name, slot = table.keys[row["key"]]
            axes = int(row["axes"])
            box = Box(tuple(map(int, row["offset"][:axes])), tuple(map(int, row["extent"][:axes])))
            for rank in ranks:
                out[rank] |= inside(name, slot, box)
    return out


SHAPES: dict[str, tuple[int, ...]] = {
    "a": (5, 7), "b": (11,), "c": (3, 4, 5), "d": (1,), "a1": (5, 7), "a2": (5, 7), "c1": (3, 4, 5),
}  # fmt: skip
FEEDS = {name: name[0] for name in SHAPES}
"""``a`` feeds three tensors, ``c`` two, as a layer that is copied to several."""


@pytest.mark.parametrize("seed", range(60))
def test_each_rank_gets_just_what_it_lacks_from_one_that_has_it(seed: int) -> None:
    rng = random.Random(seed)
    world = rng.randint(1, 6)
    sources, targets = (random_side(rng, SHAPES, world) for _ in range(2))
    feeds = FEEDS | {"d": rng.choice(["d", None])}
    schedule = Schedule(
        sources, targets, lambda key: (feeds[key[0]], key[1]) if feeds[key[0]] else None
    )
    parts = [schedule.own_part(rank) for rank in range(world)]
    have, want = elements(sources, world), elements(targets, world)
    for rank, part in enumerate(parts):
        got: set[Element] = set()
        arrived: list[Element] = []
        for owner, moves in [(rank, part.local), *part.receives.items()]:
            for move in moves:
                (name, slot), box = move.source
                assert move.box.intersect(box) == move.box
                moved = inside(name, slot, move.box)
                assert moved <= have[owner]
                arrived += moved if owner != rank else []
                for (target, _), piece in move.targets:
                    assert feeds[target] == name
                    share = move.box.intersect(piece)
                    assert share
                    got |= inside(target, slot, share)
        wanted = {e for e in want[rank] if feeds[e[0]]}
        assert got == wanted
        needed = {(str(feeds[name]), slot, element) for name, slot, element in wanted}
        assert sorted(arrived) == sorted(needed - have[rank])  # each once
        assert part.bytes_received == 4 * len(arrived)
        for peer, moves in part.receives.items():  # both ends list the same, in one order
            assert parts[peer].sends[rank] == moves
    sent, received = schedule.bytes_by_rank(world)
    assert sent.tolist() == [part.bytes_sent for part in parts]
    assert received.tolist() == [part.bytes_received for part in parts]


def inside(name: str, slot: str, box: Box) -> set[Element]:
    """Elements of a box, by plain enumeration."""
    index = np.arange(int(np.prod(SHAPES[name]))).reshape(SHAPES[name])
    return {(name, slot, int(e)) for e in index[box.slices_within(whole(SHAPES[name]))].ravel()}


def test_holders_take_turns() -> None:
    names = [f"t{i}" for i in range(12)]
    pieces = PieceTable.of(PieceMeta((n, "param"), whole((8, 8)), "float32") for n in names)
    schedule = Schedule([(pieces, [0, 1, 2])], [(pieces, [0, 1, 2, 3, 4, 5])], lambda key: key)
    sent = [schedule.own_part(rank).bytes_sent for rank in range(6)]
    assert sent == [12 * 256] * 3 + [0] * 3


def test_what_is_missing_or_of_another_type_is_named() -> None:
    half = PieceTable.of([PieceMeta(("t", "param"), Box((0, 0), (4, 8)), "float32")])
    all_ = PieceTable.of([PieceMeta(("t", "param"), whole((8, 8)), "float32")])
    other = PieceTable.of([PieceMeta(("t", "param"), whole((8, 8)), "bfloat16")])
    with pytest.raises(TransferError, match=r"t/param: 32 of 64 elements"):
        Schedule([(half, [0])], [(all_, [0])], lambda key: key).own_part(0)
    with pytest.raises(TransferError, match="t/param: bfloat16 to float32"):
        Schedule([(other, [0])], [(all_, [0])], lambda key: key).own_part(0)


def test_a_tied_copy_is_never_read() -> None:
    def piece(readable: bool) -> PieceTable:
        return PieceTable.of([PieceMeta(("t", "param"), whole((4,)), "float32", readable)])

    schedule = Schedule([(piece(True), [0]), (piece(False), [1])], [(piece(True), [1])],
                        lambda key: key)  # fmt: skip
    assert set(schedule.own_part(1).receives) == {0}


def test_tables_survive_their_bytes() -> None:
    table = PieceTable.of([PieceMeta(("é", "param"), Box((1, 2), (3, 4)), "bfloat16", False)])
    again = PieceTable.from_bytes(table.to_bytes())
    assert again.keys == table.keys
    assert (again.rows == table.rows).all()


@pytest.mark.parametrize("copied", [False, True], ids=["60 to 60 layers", "1 to 60 by copying"])
def test_seven_billion_parameters_on_4096_ranks(copied: bool) -> None:
    """To 60 layers, DP=4096 to TP=8 x PP=8 x DP=64: a rank's own part in 2 s and 200 MiB."""
    config = configuration.from_dict({"model": {"family": "gpt2", "preset": "7b"}})
    shape, world = model_shape(config), 4096
    source_shape = model_shape(config, 1) if copied else shape
    adamw = replace(config.optim, name="adamw")

    def side(shape: ModelShape, tensor: int, pipeline: int) -> list[Held]:
        layout = Layout(world=world, tensor=tensor, pipeline=pipeline)
        return [(PieceTable.of(pieces), ranks)
                for pieces, ranks in held_pieces(shape, adamw, "bf16", layout)]  # fmt: skip

    def source_of(key: Key) -> Key:
        return (re.sub(r"layers\.\d+", "layers.0", key[0]), key[1]) if copied else key

    sources, targets = side(source_shape, 1, 1), side(shape, 8, 8)
    sent, received = Schedule(sources, targets, source_of).bytes_by_rank(world)
    assert received.sum() == sent.sum()
    if not copied:  # all fp32 slots of all 7e9 parameters, but for what stays where it is
        assert 0.99 * 12 * 7e9 < received.sum() < 1.01 * 12 * 7.1e9
    for rank in (0, 1, 64, 2047, 3333, 4095):
        start = time.process_time()  # of this process alone, whatever else runs here
        part = Schedule(sources, targets, source_of).own_part(rank)
        seconds = time.process_time() - start
        least = missing_bytes(sources, targets, source_of, rank)
        print(f"rank {rank}: {seconds:.2f} s, {part.bytes_received / 1e6:.1f} MB received")
        assert seconds < 2
        assert part.bytes_received == received[rank] == least
        assert part.bytes_sent == sent[rank]
    tracemalloc.start()
    Schedule(sources, targets, source_of).own_part(4095)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{peak / 2**20:.0f} MiB")
    assert peak < 200 << 20


def missing_bytes(
    sources: list[Held], targets: list[Held], source_of: Callable[[Key], Key], rank: int
) -> int:
    """Bytes of the source that a rank's target pieces need and it does not hold: masks."""

    def boxes(side: list[Held], feeds: Callable[[Key], Key]) -> dict[Key, list[Box]]:
        found: dict[Key, list[Box]] = {}
        for table, ranks in side:
            if rank in ranks:
                for row in table.rows:
                    axes = int(row["axes"])
                    ends = (tuple(map(int, row[f][:axes])) for f in ("offset", "extent"))
                    found.setdefault(feeds(table.keys[row["key"]]), []).append(Box(*ends))
        return found

    have, total = boxes(sources, lambda key: key), 0
    for key, needed in boxes(targets, source_of).items():
        axes = range(len(needed[0].shape))
        low = tuple(min(box.offset[a] for box in needed) for a in axes)
        high = [max(box.offset[a] + box.shape[a] for box in needed) for a in axes]
        around = Box(low, tuple(end - start for start, end in zip(low, high, strict=True)))
        mask = np.zeros(around.shape, bool)
        for box in needed:
            mask[box.slices_within(around)] = True
        for box in have.get(key, []):
            held = box.intersect(around)
            if held:
                mask[held.slices_within(around)] = False
        total += int(mask.sum()) * (2 if key[1] == "param" else 4)
    return total
