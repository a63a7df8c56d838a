"""Bringing tensors of which several ranks hold parts to one rank each, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_progressive.optim.owners import homes


@dataclass(frozen=True)
class Parted:
    """A flat tensor of which the ranks of a group hold parts."""

    numel: int
    ranges: Mapping[int, tuple[int, int]]
    """The flat range [start, end) that each rank holds, for the ranks that hold some. The ranges
    are disjoint, or where ``replicated`` each is the whole tensor."""
    replicated: bool = False

    def length(self, rank: int) -> int:
        """The number of elements that a rank holds."""
        start, end = self.ranges.get(rank, (0, 0))
        return end - start


class Exchange:
    """The exchange of parted tensors: to one home each and back, in two all-to-alls over a group.

    Each rank derives the same homes from the same parts (:func:`.owners.homes`). What a home
    already holds is not sent, and nothing of a replicated tensor is gathered.
    """

    def __init__(
        self, tensors: Sequence[Parted], rank: int, group: dist.ProcessGroup | None
    ) -> None:
        self.tensors, self.rank, self.group = tensors, rank, group
        self.ranks = group.size() if group is not None else 1
        self.homes = homes(
            [tensor.numel for tensor in tensors],
            [{r: tensor.length(r) for r in tensor.ranges} for tensor in tensors],
            self.ranks,
        )
        self.owned = [i for i, home in enumerate(self.homes) if home == rank]
        self._of = [[i for i, h in enumerate(self.homes) if h == r] for r in range(self.ranks)]

    def _gathered(self, i: int, rank: int) -> int:
        """The number of elements of a tensor that a rank sends to the tensor's home."""
        tensor = self.tensors[i]
        return 0 if rank == self.homes[i] or tensor.replicated else tensor.length(rank)

    def _scattered(self, i: int, rank: int) -> int:
        """The number of elements of a tensor that a rank gets from the tensor's home."""
        return 0 if rank == self.homes[i] else self.tensors[i].length(rank)

    def _all_to_all(
        self, sent: list[torch.Tensor], out: list[int], arriving: list[int], like: torch.Tensor
    ) -> torch.Tensor:
        buffer = torch.cat(sent) if sent else like.new_empty(0)
        received = buffer.new_empty(sum(arriving))
        dist.all_to_all_single(received, buffer, arriving, out, group=self.group)
        return received

    def gather(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Take this rank's flat part of every tensor; return the whole tensors whose home is this
        rank."""
        out = [sum(self._gathered(i, self.rank) for i in self._of[r]) for r in range(self.ranks)]
        arriving = [sum(self._gathered(i, r) for i in self.owned) for r in range(self.ranks)]
        sent = [parts[i] for homed in self._of for i in homed if self._gathered(i, self.rank)]
        received = self._all_to_all(sent, out, arriving, parts[0])
        whole = {i: received.new_empty(self.tensors[i].numel) for i in self.owned}
        for i, tensor in whole.items():
            tensor[slice(*self.tensors[i].ranges[self.rank])] = parts[i]
        position = 0
        for r in range(self.ranks):
            for i in self.owned:
                if length := self._gathered(i, r):
                    part = received[position : position + length]
                    whole[i][slice(*self.tensors[i].ranges[r])] = part
                    position += length
        return list(whole.values())

    def scatter(self, whole: Sequence[torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
        """Take the whole tensors whose home is this rank; return this rank's part of every tensor.

        Args:
            like: a tensor of their type and on their device, for a rank that is no tensor's home.
        """
        out = [sum(self._scattered(i, r) for i in self.owned) for r in range(self.ranks)]
        arriving = [sum(self._scattered(i, self.rank) for i in homed) for homed in self._of]
        sent = [
            tensor[slice(*self.tensors[i].ranges[r])]
            for r in range(self.ranks)
            for i, tensor in zip(self.owned, whole, strict=True)
            if self._scattered(i, r)
        ]
        received = self._all_to_all(sent, out, arriving, like)
        parts = {
            i: tensor[slice(*self.tensors[i].ranges[self.rank])]
            for i, tensor in zip(self.owned, whole, strict=True)
        }
        position = 0
        for homed in self._of:
            for i in homed:
                if i not in parts:
                    length = self._scattered(i, self.rank)
                    parts[i] = received[position : position + length]
                    position += length
        return [parts[i] for i in range(len(self.tensors))]
