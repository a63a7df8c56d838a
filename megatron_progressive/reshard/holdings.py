"""What a rank holds of both states while a reshard goes on, and when each tensor's memory comes
and goes."""

from __future__ import annotations

from collections import Counter

import torch

from megatron_progressive.reshard.boxes import MASTER, PARAM, Box, Piece, ShardedState
from megatron_progressive.reshard.schedule import Move, OwnPart
from megatron_progressive.runtime.late_memory import LateMemory


def round_of(move: Move) -> tuple[int, str]:
    """The round of a move: weights, then master weights, then each other slot. Tensors of a slot
    take no more room than gradients had, so that one slot may be there twice."""
    slot = move.source[0][1]
    return {PARAM: 0, MASTER: 1}.get(slot, 2), slot


class Holdings:
    """This rank's pieces of both states, by key and box, and the bytes that they take.

    Args:
        own: what the rank copies, sends and receives.
        memory: gives the target's tensors theirs.
    """

    def __init__(
        self, source: ShardedState, target: ShardedState, own: OwnPart, memory: LateMemory
    ) -> None:
        self._held = {(piece.key, piece.box): piece for piece in source.pieces}
        self._wanted = {(piece.key, piece.box): piece for piece in target.pieces}
        self._memory = memory
        old = {_place(piece): piece.data.untyped_storage() for piece in source.pieces}
        new = {_place(piece): piece.data.untyped_storage() for piece in target.pieces}
        self._old = old
        self.now = self.peak = sum(s.nbytes() for s in (*old.values(), *new.values()))
        self._whole = self._filled(own)
        moves = [*own.local, *(move for moves in own.sends.values() for move in moves)]
        self._unread = Counter(dict.fromkeys(old, 0))
        self._unread.update(_place(self._held[move.source]) for move in moves)
        for place in [place for place, reads in self._unread.items() if not reads]:
            self._release(place)  # others have the same

    def add(self, nbytes: int) -> None:
        """Count bytes that are held beside the states."""
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def read(self, move: Move, part: Box) -> torch.Tensor:
        """A part of a source piece."""
        return _view(self._held[move.source], part)

    def done(self, move: Move) -> None:
        """A move has been read: its source goes where it was the last one."""
        place = _place(self._held[move.source])
        self._unread[place] -= 1
        if not self._unread[place]:
            self._release(place)

    def write(self, move: Move, part: Box, data: torch.Tensor) -> None:
        """Write a part of a move, which ``data`` holds, to all pieces that take some of it."""
        for target in move.targets:
            share = part.intersect(target[1])
            if share is not None:
                piece = self._wanted[target]
                self._give(piece)
                _view(piece, share).copy_(data[share.slices_within(part)])

    def _give(self, piece: Piece) -> None:
        if not self._memory.lacks(piece.data):
            return
        storage = piece.data.untyped_storage()
        whole = _place(piece) in self._whole
        self.add(self._memory.give(storage) if whole else self._memory.give_zeros(storage))

    def _filled(self, own: OwnPart) -> set[int]:
        """The storages of which the moves write every byte. A piece is filled as a whole or not at
        all."""
        written = Counter[int]()
        moves = (move for moves in (own.local, *own.receives.values()) for move in moves)
        for target in {target for move in moves for target in move.targets}:
            written[_place(self._wanted[target])] += self._wanted[target].nbytes
        storages = (piece.data.untyped_storage() for piece in self._wanted.values())
        return {id(s) for s in storages if written[id(s)] == self._memory.nbytes(s)}

    def _release(self, place: int) -> None:
        storage = self._old[place]
        if storage.resizable():
            self.now -= storage.nbytes()
            storage.resize_(0)


def _place(piece: Piece) -> int:
    """The number of a piece's storage, which pieces may share."""
    return id(piece.data.untyped_storage())


def _view(piece: Piece, box: Box) -> torch.Tensor:
    return piece.data[box.slices_within(piece.box)]
