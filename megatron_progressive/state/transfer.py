"""Reshard in memory: move boxes of global tensors from one set of ranks' pieces to another.

Every rank gathers the same metadata, derives its own part of the same schedule and exchanges
it point to point. No rank sees whole tensors, nothing goes through disk, and the bytes that
are staged at once are bounded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_progressive.state.boxes import PARAM, Box, Key, Piece, PieceMeta, ShardedState
from megatron_progressive.state.schedule import Held, Move, PieceTable, Schedule, TransferError

_SMALL = 16 << 10  # tables up to this size travel in one all-gather, larger ones one by one


@dataclass(frozen=True)
class TransferStats:
    """Over all ranks: bytes sent between ranks, the largest staging of one rank and the
    largest target state of one rank."""

    bytes_moved: int
    peak_staging_bytes: int
    largest_target_bytes: int


def _device() -> torch.device:
    """Where the backend sends from; also for numbers that live on the CPU."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def gather_metadata(states: Iterable[ShardedState]) -> list[list[Held]]:
    """Everybody's metadata of each of some states. Collective over all ranks.

    A rank's weights and its other slots are separate tables: data-parallel ranks share the
    first, often the second too, and a table that several ranks share travels once.
    """
    world, rank, device = dist.get_world_size(), dist.get_rank(), _device()
    mine: list[bytes] = []
    for state in states:
        weights: list[PieceMeta] = []
        others: list[PieceMeta] = []
        for piece in state.pieces:
            (weights if piece.slot == PARAM else others).append(piece.meta)
        mine += [PieceTable.of(weights).to_bytes(), PieceTable.of(others).to_bytes()]
    digests = b"".join(hashlib.blake2b(table, digest_size=16).digest() for table in mine)
    everyone = torch.empty(world, len(digests), dtype=torch.uint8, device=device)
    own = torch.from_numpy(np.frombuffer(digests, np.uint8).copy()).to(device)
    dist.all_gather(list(everyone.unbind()), own)
    table_of = everyone.cpu().numpy().reshape(world, len(mine), 16)
    holders: dict[bytes, dict[int, list[int]]] = {}
    for other in range(world):
        for index in range(len(mine)):
            digest = table_of[other, index].tobytes()
            holders.setdefault(digest, {}).setdefault(index, []).append(other)
    owner = {digest: min(min(r) for r in where.values()) for digest, where in holders.items()}
    tables = _exchange_tables(
        {table_of[rank, i].tobytes(): table for i, table in enumerate(mine)}, owner, rank, device
    )
    gathered: list[list[Held]] = [[] for _ in range(len(mine) // 2)]
    for digest, where in holders.items():
        table = PieceTable.from_bytes(tables[digest])
        for index, ranks in where.items():
            gathered[index // 2].append((table, ranks))
    return gathered


def _exchange_tables(
    mine: dict[bytes, bytes], owner: dict[bytes, int], rank: int, device: torch.device
) -> dict[bytes, bytes]:
    """Each distinct table, by digest, from the first rank that has it."""
    world = dist.get_world_size()
    by_owner: list[list[bytes]] = [[] for _ in range(world)]
    for digest, first in owner.items():  # the same order on every rank
        by_owner[first].append(digest)
    most = max(len(digests) for digests in by_owner)
    sizes = torch.zeros(most, dtype=torch.int64)
    for i, digest in enumerate(by_owner[rank]):
        sizes[i] = len(mine[digest])
    all_sizes = torch.empty(world, most, dtype=torch.int64, device=device)
    dist.all_gather(list(all_sizes.unbind()), sizes.to(device))
    size_of = {
        digest: int(all_sizes[first, i])
        for first, digests in enumerate(by_owner)
        for i, digest in enumerate(digests)
    }
    tables: dict[bytes, bytes] = {}
    small = [[d for d in digests if size_of[d] <= _SMALL] for digests in by_owner]
    room = max(sum(size_of[d] for d in digests) for digests in small)
    packed = b"".join(mine[d] for d in small[rank]).ljust(room, b"\0")
    if room:
        received = torch.empty(world, room, dtype=torch.uint8, device=device)
        own = torch.from_numpy(np.frombuffer(packed, np.uint8).copy()).to(device)
        dist.all_gather(list(received.unbind()), own)
        for first, data in enumerate(received.cpu().numpy()):
            start = 0
            for digest in small[first]:
                tables[digest] = data[start : start + size_of[digest]].tobytes()
                start += size_of[digest]
    for first, digests in enumerate(by_owner):
        for digest in digests:
            if digest in tables:
                continue
            buffer = torch.empty(size_of[digest], dtype=torch.uint8, device=device)
            if first == rank:
                buffer.copy_(torch.from_numpy(np.frombuffer(mine[digest], np.uint8).copy()))
            dist.broadcast(buffer, first)
            tables[digest] = buffer.cpu().numpy().tobytes()
    return tables


def transfer(
    source: ShardedState,
    target: ShardedState,
    source_of: Callable[[Key], Key | None],
    staging_bytes: int,
) -> TransferStats:
    """Fill the target's pieces from the sources of all ranks. Collective over all ranks.

    Args:
        source: this rank's pieces in the old layout; only read.
        target: this rank's pieces in the new layout.
        source_of: the source of a target tensor; None where it is not copied.
        staging_bytes: most bytes staged at once on a rank.

    Raises:
        TransferError: on every rank, before anything is written: a piece that the sources do
            not cover, or of another type.
    """
    rank, device = dist.get_rank(), _device()
    sources, targets = gather_metadata([source, target])
    problem, own = "", None
    try:
        own = Schedule(sources, targets, source_of).own_part(rank)
    except TransferError as error:
        problem = str(error)
    peers = len({*own.sends, *own.receives}) if own else 0
    limits = torch.tensor([peers, bool(problem)], dtype=torch.int64, device=device)
    dist.all_reduce(limits, op=dist.ReduceOp.MAX)
    if limits[1] or own is None:
        problems = [problem] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        raise TransferError(next(p for p in problems if p))
    held = {(piece.key, piece.box): piece for piece in source.pieces}
    wanted = {(piece.key, piece.box): piece for piece in target.pieces}
    for move in own.local:
        _view(wanted[move.target], move.box).copy_(_view(held[move.source], move.box))
    # One message to and one from each peer at a time; both ends must cut alike.
    message_bytes = max(1 << 10, staging_bytes // (2 * max(1, int(limits[0]))) // 8 * 8)
    sends = {peer: _messages(moves, message_bytes) for peer, moves in sorted(own.sends.items())}
    receives = {peer: _messages(m, message_bytes) for peer, m in sorted(own.receives.items())}
    # Staging is allocated once: fresh memory costs more than the copy into it.
    outbox = {peer: _staging(messages, device) for peer, messages in sends.items()}
    inbox = {peer: _staging(messages, device) for peer, messages in receives.items()}
    for turn in range(max((len(m) for m in (*sends.values(), *receives.values())), default=0)):
        outgoing = [
            (peer, outbox[peer], [_view(held[move.source], part) for move, part in messages[turn]])
            for peer, messages in sends.items()
            if turn < len(messages)
        ]
        incoming = [
            (peer, inbox[peer], [_view(wanted[move.target], part) for move, part in messages[turn]])
            for peer, messages in receives.items()
            if turn < len(messages)
        ]
        _exchange(outgoing, incoming)
    peak = sum(buffer.numel() for buffer in (*outbox.values(), *inbox.values()))
    sent = torch.tensor([own.bytes_sent], dtype=torch.int64, device=device)
    largest = torch.tensor([peak, target.nbytes], dtype=torch.int64, device=device)
    dist.all_reduce(sent)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return TransferStats(int(sent), int(largest[0]), int(largest[1]))


def _view(piece: Piece, box: Box) -> torch.Tensor:
    return piece.data[box.slices_within(piece.box)]


def _messages(moves: Iterable[Move], most: int) -> list[list[tuple[Move, Box]]]:
    """Cut one pair's moves into messages of at most ``most`` bytes; both ends cut alike."""
    messages: list[list[tuple[Move, Box]]] = []
    room = 0
    for move in moves:
        itemsize = move.nbytes // move.box.numel
        for part in move.box.split(max(1, most // itemsize)):
            nbytes = _aligned(part.numel * itemsize)
            if nbytes > room or not messages:
                messages.append([])
                room = most
            messages[-1].append((move, part))
            room -= nbytes
    return messages


def _aligned(nbytes: int) -> int:
    return math.ceil(nbytes / 8) * 8  # so that every type can be viewed in the byte buffer


def _staging(messages: list[list[tuple[Move, Box]]], device: torch.device) -> torch.Tensor:
    """Room for the longest of one peer's messages, in bytes."""
    longest = max(
        sum(_aligned(part.numel * (move.nbytes // move.box.numel)) for move, part in message)
        for message in messages
    )
    return torch.empty(longest, dtype=torch.uint8, device=device)


Message = tuple[int, torch.Tensor, list[torch.Tensor]]
"""Peer, staging buffer, and the views that it is packed from or unpacked into."""


def _exchange(outgoing: list[Message], incoming: list[Message]) -> None:
    """Send and receive one message of each peer."""
    operations = []
    for peer, buffer, views in outgoing:
        for slot, view in zip(_slots(buffer, views), views, strict=True):
            slot.copy_(view)
        operations.append(dist.P2POp(dist.isend, buffer[: _length(views)], peer))
    for peer, buffer, views in incoming:
        operations.append(dist.P2POp(dist.irecv, buffer[: _length(views)], peer))
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    for _, buffer, views in incoming:
        for slot, view in zip(_slots(buffer, views), views, strict=True):
            view.copy_(slot)


def _length(views: list[torch.Tensor]) -> int:
    return sum(_aligned(view.numel() * view.element_size()) for view in views)


def _slots(buffer: torch.Tensor, views: list[torch.Tensor]) -> list[torch.Tensor]:
    """The places of some views in a byte buffer, of their types and shapes."""
    slots, start = [], 0
    for view in views:
        nbytes = view.numel() * view.element_size()
        slots.append(buffer[start : start + nbytes].view(view.dtype).view(view.shape))
        start += _aligned(nbytes)
    return slots
