"""Resharding in memory: moving boxes of global tensors from one set of ranks' pieces to another.

Every rank gathers the same metadata, derives its own part of the same schedule and exchanges it
point to point. No rank sees whole tensors, nothing goes through disk, and the number of bytes that
are staged at once is bounded.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_progressive.reshard.boxes import PARAM, Box, Key, PieceMeta, ShardedState
from megatron_progressive.reshard.holdings import Holdings, round_of
from megatron_progressive.reshard.metadata import DTYPE_BYTES, Held, PieceTable
from megatron_progressive.reshard.schedule import Move, Schedule, TransferError
from megatron_progressive.runtime.late_memory import LateMemory

_SMALL = 16 << 10  # tables up to this size travel in one all-gather, larger ones one by one


@dataclass(frozen=True)
class TransferStats:
    """The numbers of a transfer over all ranks."""

    bytes_moved: int
    """The bytes sent between ranks."""
    peak_staging_bytes: int
    """The largest staging of one rank."""
    peak_bytes: int
    """The most bytes that a rank held at once: of both states, and staged."""


def _device() -> torch.device:
    """The device that the backend sends from, which also counts for numbers that live on the
    CPU."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def gather_metadata(states: Iterable[ShardedState]) -> list[list[Held]]:
    """The metadata of all ranks, of each of some states. Collective over all ranks.

    The weights and the other slots of a rank are separate tables. Data-parallel ranks share the
    first table and often the second, too; a table that several ranks share travels once.
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
    """Each different table, by its digest, from the first rank that has it."""
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
    memory: LateMemory,
) -> TransferStats:
    """Fill the target's pieces from the sources of all ranks. Collective over all ranks.

    Slots go one after the other (:func:`.holdings.round_of`).

    Args:
        source: this rank's pieces in the old layout. Their storages are emptied: each as soon as
            all who need it have it, in the end all.
        target: this rank's pieces in the new layout.
        source_of: gives the source tensor of a target tensor, and None where it is not copied.
        staging_bytes: the most bytes that are staged at once on a rank.
        memory: gives the target's tensors memory as they are filled; those that are not copied have
            none afterwards.

    Raises:
        TransferError: the sources do not cover a piece, or have another type. It is raised on every
            rank, before anything is written.
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
    holdings = Holdings(source, target, own, memory)
    # One message to and one from each peer at a time; both ends must cut alike.
    message_bytes = max(1 << 10, staging_bytes // (2 * max(1, int(limits[0]))) // 8 * 8)
    sends = {p: _rounds(moves, message_bytes) for p, moves in sorted(own.sends.items())}
    receives = {p: _rounds(moves, message_bytes) for p, moves in sorted(own.receives.items())}
    # Staging is allocated once: fresh memory costs more than the copy into it.
    outbox = {peer: _staging(rounds, device) for peer, rounds in sends.items()}
    inbox = {peer: _staging(rounds, device) for peer, rounds in receives.items()}
    staged = sum(buffer.numel() for buffer in (*outbox.values(), *inbox.values()))
    holdings.add(staged)
    local: dict[Round, list[Move]] = defaultdict(list)
    for move in sorted(own.local, key=lambda move: (move.source[0], move.source[1].offset)):
        local[round_of(move)].append(move)
    # A message is of one round at both of its ends, so no two ranks wait for each other in a ring.
    for number in sorted({*local, *(n for r in (*sends.values(), *receives.values()) for n in r)}):
        for move in local[number]:
            holdings.write(move, move.box, holdings.read(move, move.box))
            holdings.done(move)
        out = {peer: rounds.get(number, []) for peer, rounds in sends.items()}
        into = {peer: rounds.get(number, []) for peer, rounds in receives.items()}
        for turn in range(max((len(m) for m in (*out.values(), *into.values())), default=0)):
            _exchange(
                [(peer, outbox[peer], m[turn]) for peer, m in out.items() if turn < len(m)],
                [(peer, inbox[peer], m[turn]) for peer, m in into.items() if turn < len(m)],
                holdings,
            )
    sent = torch.tensor([own.bytes_sent], dtype=torch.int64, device=device)
    largest = torch.tensor([staged, holdings.peak], dtype=torch.int64, device=device)
    dist.all_reduce(sent)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return TransferStats(int(sent), int(largest[0]), int(largest[1]))


Message = list[tuple[Move, Box]]
"""Parts of moves that travel together in one message."""
Round = tuple[int, str]


def _exchange(
    outgoing: list[tuple[int, torch.Tensor, Message]],
    incoming: list[tuple[int, torch.Tensor, Message]],
    holdings: Holdings,
) -> None:
    """Send and receive one message of each peer, given as (peer, staging buffer, message)."""
    operations = []
    for peer, buffer, message in outgoing:
        slots, length = _slots(buffer, message)
        for (move, part), slot in zip(message, slots, strict=True):
            slot.copy_(holdings.read(move, part))
            if _is_last(move, part):
                holdings.done(move)
        operations.append(dist.P2POp(dist.isend, buffer[:length], peer))
    arriving: list[tuple[tuple[Move, Box], torch.Tensor]] = []
    for peer, buffer, message in incoming:
        slots, length = _slots(buffer, message)
        arriving += zip(message, slots, strict=True)
        operations.append(dist.P2POp(dist.irecv, buffer[:length], peer))
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    for (move, part), slot in arriving:
        holdings.write(move, part, slot)


def _is_last(move: Move, part: Box) -> bool:
    """Whether a part of a move is the last one of it to be sent."""
    ends = (offset + size for offset, size in zip(move.box.offset, move.box.shape, strict=True))
    return tuple(ends) == tuple(o + n for o, n in zip(part.offset, part.shape, strict=True))


def _rounds(moves: Iterable[Move], most: int) -> dict[Round, list[Message]]:
    """The messages of one pair, by round."""
    rounds: dict[Round, list[Move]] = defaultdict(list)
    for move in moves:
        rounds[round_of(move)].append(move)
    return {number: _messages(members, most) for number, members in rounds.items()}


def _messages(moves: Iterable[Move], most: int) -> list[Message]:
    """Cut the moves of one pair into messages of at most ``most`` bytes; both ends cut alike."""
    messages: list[Message] = []
    room = 0
    for move in moves:
        for part in move.box.split(max(1, most // DTYPE_BYTES[move.dtype])):
            nbytes = _aligned(part, move.dtype)
            if nbytes > room or not messages:
                messages.append([])
                room = most
            messages[-1].append((move, part))
            room -= nbytes
    return messages


def _aligned(part: Box, dtype: str) -> int:
    """The bytes of a part's slot, rounded up to eights so that every type can be viewed in the
    buffer."""
    return math.ceil(part.numel * DTYPE_BYTES[dtype] / 8) * 8


def _staging(rounds: dict[Round, list[Message]], device: torch.device) -> torch.Tensor:
    """The bytes that the longest message of one peer needs."""
    messages = (message for messages in rounds.values() for message in messages)
    longest = max(sum(_aligned(part, move.dtype) for move, part in m) for m in messages)
    return torch.empty(longest, dtype=torch.uint8, device=device)


def _slots(buffer: torch.Tensor, message: Message) -> tuple[list[torch.Tensor], int]:
    """The places of a message's parts in a byte buffer, as views of their types and shapes, and the
    number of bytes that they take together."""
    slots, start = [], 0
    for move, part in message:
        flat = buffer[start : start + part.numel * DTYPE_BYTES[move.dtype]]
        slots.append(flat.view(getattr(torch, move.dtype)).view(part.shape))
        start += _aligned(part, move.dtype)
    return slots, start
