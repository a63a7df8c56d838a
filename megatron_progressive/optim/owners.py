"""Which rank orthogonalises which matrix. Needs no torch.

Ownership is decided here, in two steps. :func:`owner_places` lays a model's tensors into the flat
buffers that data-parallel ranks divide, so that nearly every matrix lies whole in one rank's
share: that rank owns it, and has it after the reduce-scatter that ZeRO does anyway. For what could
not be laid out so, and for the shards of tensor-parallel ranks, :func:`homes` chooses the rank to
which the parts travel (:mod:`.exchange`). Every rank derives the same answer for itself.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_progressive.optim.rules import ADAMW

_TENSOR_ALIGNMENT = 64
"""Elements: where a tensor may start in a buffer of the distributed optimizer."""
_BUCKET_ALIGNMENT = 128
"""Elements: the end of a bucket is a multiple of this and of the data-parallel ranks."""
MOST_PADDING = 0.05
"""Of a bucket, what :func:`owner_places` may leave empty to have tensors whole: it is sent, too."""
_PADDING_STEPS = 10


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a buffer whose buckets are each cut into equal shares, one of each
    for every data-parallel rank."""

    start: int
    """Of the tensor, from the start of its bucket."""
    numel: int
    share: int
    """Elements of the bucket on each rank, padding included."""
    bucket: int = 0
    """Number of the bucket in its buffer."""

    def ranks(self) -> range:
        """Data-parallel ranks that own some of the tensor."""
        return range(self.start // self.share, (self.start + self.numel - 1) // self.share + 1)

    def owned(self, data_rank: int) -> tuple[int, int]:
        """The flat range of the tensor that a rank owns; empty where first >= last."""
        low = data_rank * self.share - self.start
        return max(0, low), min(self.numel, low + self.share)


@dataclass(frozen=True)
class BufferTensor:
    """One tensor of a buffer, as a tensor-parallel rank has it."""

    name: str
    numel: int
    rule: str = ADAMW
    """Its update rule: AdamW's tensors may be cut anywhere."""
    alone: bool = False
    """Whether it has a bucket to itself: the embedding that two pipeline stages have copies of.
    Their gradients are added where each rank owns the same part of both."""
    first: bool = False
    """Whether it lies at the start of its bucket, whole in the first share: that embedding, where
    it fits on both stages."""


def rounded_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def _in_a_row(numels: Sequence[int]) -> tuple[list[int], int]:
    """Starts of tensors one after the other, each at a multiple of 64, and the end of the last."""
    starts, end = [], 0
    for numel in numels:
        starts.append(rounded_up(end, _TENSOR_ALIGNMENT))
        end = starts[-1] + numel
    return starts, end


def _equal_share(numel: int, data_ranks: int) -> int:
    return rounded_up(numel, math.lcm(data_ranks, _BUCKET_ALIGNMENT)) // data_ranks


def owner_places(tensors: Sequence[BufferTensor], data_ranks: int) -> list[Place]:
    """Places of tensors in a model chunk's buffer, under Muon-NSGD whole in a rank's share.

    Runs of tensors in reverse order of registration make buckets (Megatron-core takes them in
    this order): a tensor that is ``alone``, tensors of AdamW, which are laid out as
    :func:`distributed_optimizer_places` says, and the others. Of these as many as possible lie
    whole inside one share, the largest first, each in the share with the most room, while
    padding is at most :data:`MOST_PADDING`; where they do not fit, the largest are cut: they
    lie in a row at the start of the bucket. Shares are equal, and Newton-Schulz costs nearly the
    same for each element of a model's matrices, so this balances memory and time.

    Args:
        tensors: in the order of registration. Within a bucket of whole tensors the places
            depend on names and sizes alone.

    Raises:
        RuntimeError: a tensor that is to lie first is larger than a share.
    """
    places: dict[int, Place] = {}
    for bucket, members in enumerate(_buckets(tensors)):
        first = tensors[members[0]]
        if first.alone or first.rule == ADAMW:
            starts, end = _in_a_row([tensors[i].numel for i in members])
            share = _equal_share(end, data_ranks)
        else:
            members.sort(key=lambda i: (not tensors[i].first, -tensors[i].numel, tensors[i].name))
            starts, share = _whole_in_shares([tensors[i].numel for i in members], data_ranks)
        for i, start in zip(members, starts, strict=True):
            places[i] = Place(start, tensors[i].numel, share, bucket)
            if tensors[i].first and places[i].owned(0) != (0, tensors[i].numel):
                raise RuntimeError(f"{tensors[i].name}: does not fit into the first of the shares")
    return [places[i] for i in range(len(tensors))]


def _buckets(tensors: Sequence[BufferTensor]) -> Iterator[list[int]]:
    """Numbers of the tensors of each bucket, in reverse order of registration."""

    def kind(i: int) -> tuple[int, bool]:
        return (i if tensors[i].alone else -1), tensors[i].rule == ADAMW

    for _, members in itertools.groupby(reversed(range(len(tensors))), key=kind):
        yield list(members)


def _whole_in_shares(numels: Sequence[int], data_ranks: int) -> tuple[list[int], int]:
    """Starts of tensors, given the largest first (but for one that lies at the start), and the
    share; as few are cut as fit."""
    total = sum(rounded_up(numel, _TENSOR_ALIGNMENT) for numel in numels)
    least = rounded_up(-(-total // data_ranks), _BUCKET_ALIGNMENT)
    shares = [
        least + int(least * MOST_PADDING * step / _PADDING_STEPS) // _BUCKET_ALIGNMENT
        * _BUCKET_ALIGNMENT for step in range(_PADDING_STEPS + 1)
    ]  # fmt: skip

    def packed(cut: int) -> tuple[list[int], int] | None:
        for share in shares:
            starts = _packed(numels, cut, share, data_ranks)
            if starts is not None:
                return starts, share
        return None

    too_large = sum(numel > shares[-1] for numel in numels)
    # all cut, one after the other, always fit
    counts = range(too_large, len(numels))
    cut = too_large + bisect.bisect_left(counts, True, key=lambda cut: packed(cut) is not None)
    result = packed(cut)
    assert result is not None
    return result


def _packed(numels: Sequence[int], cut: int, share: int, data_ranks: int) -> list[int] | None:
    """Starts of tensors of which the first ``cut`` lie in a row and each other inside one share;
    None where they do not fit."""
    starts, end = _in_a_row(numels[:cut])
    end = rounded_up(end, _TENSOR_ALIGNMENT)
    first, used = divmod(end, share)
    # (-room, rank); with the first share's rank in its place it is a heap from the start
    rooms = [(-share, rank) for rank in range(first + 1, data_ranks)]
    if first < data_ranks:
        heapq.heappush(rooms, (used - share, first))
    for numel in numels[cut:]:
        if not rooms or -rooms[0][0] < numel:
            return None
        room, rank = -rooms[0][0], rooms[0][1]
        starts.append((rank + 1) * share - room)
        heapq.heapreplace(rooms, (rounded_up(numel, _TENSOR_ALIGNMENT) - room, rank))
    return starts


def homes(numels: Sequence[int], lengths: Sequence[Mapping[int, int]], ranks: int) -> list[int]:
    """The rank that becomes the owner of each tensor that several ranks hold parts of.

    It is the rank that holds the largest part, of several such the one that has least so far; the
    largest tensors choose first.

    Args:
        numels: elements of each whole tensor.
        lengths: of each tensor, the elements that each rank holds, of those that hold some.
        ranks: of the group.
    """
    load, found = [0] * ranks, [0] * len(numels)
    for i in sorted(range(len(numels)), key=lambda i: (-numels[i], i)):
        longest = max(lengths[i].values())
        holders = [rank for rank, length in lengths[i].items() if length == longest]
        found[i] = min(holders, key=lambda rank: (load[rank], rank))
        load[found[i]] += numels[i]
    return found
