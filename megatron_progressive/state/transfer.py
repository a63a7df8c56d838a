"""Reshard in memory: move boxes of global tensors from one set of ranks' pieces to another.

Every rank gathers the same metadata, derives the same schedule and then exchanges its own
part point to point. No rank sees whole tensors, nothing goes through disk, and the bytes that
are staged at once are bounded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_progressive.state.boxes import Box, Key, Piece, PieceMeta, ShardedState

STAGING_BYTES = 64 << 20
"""Most bytes a rank has staged for sending and receiving at once."""


@dataclass(frozen=True)
class Copy:
    """One box that moves: part of a source piece to part of a target piece."""

    source_rank: int
    source_piece: int
    target_rank: int
    target_piece: int
    source_box: Box
    target_box: Box
    nbytes: int


@dataclass(frozen=True)
class TransferStats:
    """Over all ranks: bytes sent between ranks, and the largest staging of one rank."""

    bytes_moved: int
    peak_staging_bytes: int


class TransferError(RuntimeError):
    """A target box that no source covers, or whose type differs."""


def metadata(state: ShardedState) -> list[PieceMeta]:
    """What this rank tells the others."""
    return [piece.meta for piece in state.pieces]


def schedule(
    sources: list[list[PieceMeta]],
    targets: list[list[PieceMeta]],
    source_of: Callable[[Key], Key | None],
) -> list[Copy]:
    """Every copy of a reshard, the same on every rank.

    Args:
        sources: metadata of each rank's source pieces.
        targets: metadata of each rank's target pieces.
        source_of: the source tensor of a target tensor; None where it is not copied.

    A box is sent once to each rank that needs it. Where several ranks hold it, the target's
    own rank comes first, then the one that has sent least so far.

    Raises:
        TransferError: a target that the sources do not cover, or of another type.
    """
    holders: dict[Key, dict[Box, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for rank, pieces in enumerate(sources):
        for index, piece in enumerate(pieces):
            if piece.readable:
                holders[piece.key][piece.box].append((rank, index))
    sent = [0] * len(sources)
    copies = []
    for rank, pieces in enumerate(targets):
        for index, piece in enumerate(pieces):
            key = source_of(piece.key)
            if key is None:
                continue
            covered = 0
            for box, owners in holders.get(key, {}).items():
                part = box.intersect(piece.box)
                if part is None:
                    continue
                covered += part.numel
                owner = min(owners, key=lambda o: (o[0] != rank, sent[o[0]], o))
                dtype = sources[owner[0]][owner[1]].dtype
                if dtype != piece.dtype:
                    raise TransferError(f"{'/'.join(piece.key)}: {dtype} to {piece.dtype}")
                nbytes = part.numel * getattr(torch, dtype).itemsize
                if owner[0] != rank:
                    sent[owner[0]] += nbytes
                copies.append(Copy(*owner, rank, index, part, part, nbytes))
            if covered != piece.box.numel:
                raise TransferError(
                    f"{'/'.join(piece.key)}: {covered} of {piece.box.numel} elements of "
                    f"{piece.box} are in the source ({'/'.join(key)})"
                )
    return copies


def transfer(
    source: ShardedState,
    target: ShardedState,
    source_of: Mapping[Key, Key] | None = None,
    staging_bytes: int = STAGING_BYTES,
) -> TransferStats:
    """Fill the target's pieces from the sources of all ranks. Collective over all ranks.

    Args:
        source: this rank's pieces in the old layout; only read.
        target: this rank's pieces in the new layout.
        source_of: source of each target tensor that is copied; without it, each tensor comes
            from the one of its own name.
        staging_bytes: most bytes staged at once on a rank.

    Raises:
        TransferError: on every rank, before anything is written.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    mine = (metadata(source), metadata(target))
    gathered: list[tuple[list[PieceMeta], list[PieceMeta]]] = [mine] * world
    dist.all_gather_object(gathered, mine)
    lookup = (lambda key: key) if source_of is None else source_of.get
    copies = schedule([g[0] for g in gathered], [g[1] for g in gathered], lookup)
    # Each peer's messages are at most this long: one being sent to and one received from each.
    message_bytes = max(1 << 10, staging_bytes // (2 * max(1, world - 1)))
    outgoing: dict[int, list[Copy]] = defaultdict(list)
    incoming: dict[int, list[Copy]] = defaultdict(list)
    for copy in copies:
        if copy.source_rank == copy.target_rank == rank:
            part = _view(source.pieces[copy.source_piece], copy.source_box)
            _view(target.pieces[copy.target_piece], copy.target_box).copy_(part)
        elif copy.source_rank == rank:
            outgoing[copy.target_rank].append(copy)
        elif copy.target_rank == rank:
            incoming[copy.source_rank].append(copy)
    sends = {peer: _messages(parts, message_bytes) for peer, parts in outgoing.items()}
    receives = {peer: _messages(parts, message_bytes) for peer, parts in incoming.items()}
    # Messages are made where the backend sends from, also for numbers that live on the CPU.
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    peak = 0
    rounds = max((len(m) for m in (*sends.values(), *receives.values())), default=0)
    for turn in range(rounds):
        peak = max(peak, _exchange(turn, sends, receives, source, target, device))
    moved = sum(copy.nbytes for copy in copies if copy.source_rank != copy.target_rank)
    largest = torch.tensor([peak], dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return TransferStats(moved, int(largest))


def _view(piece: Piece, box: Box) -> torch.Tensor:
    return piece.data[box.slices_within(piece.box)]


def _messages(copies: Iterable[Copy], most: int) -> list[list[tuple[Copy, Box]]]:
    """Cut one pair's copies into messages of at most ``most`` bytes; both ends cut alike."""
    messages: list[list[tuple[Copy, Box]]] = []
    room = 0
    for copy in copies:
        itemsize = copy.nbytes // copy.source_box.numel
        for part in copy.source_box.split(max(1, most // itemsize)):
            nbytes = _aligned(part.numel * itemsize)
            if nbytes > room or not messages:
                messages.append([])
                room = most
            messages[-1].append((copy, part))
            room -= nbytes
    return messages


def _aligned(nbytes: int) -> int:
    return math.ceil(nbytes / 8) * 8  # so that every type can be viewed in the byte buffer


def _exchange(
    turn: int,
    sends: dict[int, list[list[tuple[Copy, Box]]]],
    receives: dict[int, list[list[tuple[Copy, Box]]]],
    source: ShardedState,
    target: ShardedState,
    device: torch.device,
) -> int:
    """Send and receive the ``turn``-th message of every peer; returns the bytes staged."""
    operations, arriving, staged = [], [], 0
    for peer, messages in sorted(sends.items()):
        if turn < len(messages):
            views = [_view(source.pieces[c.source_piece], part) for c, part in messages[turn]]
            buffer = _pack(views, device)
            staged += buffer.numel()
            operations.append(dist.P2POp(dist.isend, buffer, peer))
    for peer, messages in sorted(receives.items()):
        if turn < len(messages):
            views = [_view(target.pieces[c.target_piece], part) for c, part in messages[turn]]
            total = sum(_aligned(v.numel() * v.element_size()) for v in views)
            buffer = torch.empty(total, dtype=torch.uint8, device=device)
            staged += total
            arriving.append((buffer, views))
            operations.append(dist.P2POp(dist.irecv, buffer, peer))
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    for buffer, views in arriving:
        start = 0
        for view in views:
            nbytes = view.numel() * view.element_size()
            view.copy_(buffer[start : start + nbytes].view(view.dtype).view(view.shape))
            start += _aligned(nbytes)
    return staged


def _pack(views: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    total = sum(_aligned(v.numel() * v.element_size()) for v in views)
    buffer = torch.empty(total, dtype=torch.uint8, device=device)
    start = 0
    for view in views:
        nbytes = view.numel() * view.element_size()
        buffer[start : start + nbytes].view(view.dtype).view(view.shape).copy_(view)
        start += _aligned(nbytes)
    return buffer
