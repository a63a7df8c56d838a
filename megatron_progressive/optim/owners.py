"""Which rank orthogonalises which matrix. Needs no torch.

Ownership is decided here, in two steps. :func:`owner_places` lays a model's tensors into the flat
buffers that data-parallel ranks divide, so that nearly every matrix lies whole in one rank's share:
that rank owns it, and has it after the reduce-scatter that ZeRO does anyway. For matrices that
cannot be laid out in that way, and for the shards of tensor-parallel ranks, :func:`homes` chooses
the rank to which the parts travel (:mod:`.exchange`). Every rank derives the same answer for
itself.
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
"""A tensor starts at a multiple of so many elements in a buffer of the distributed optimizer."""
_BUCKET_ALIGNMENT = 128
"""The end of a bucket is a multiple of so many elements and of the number of data-parallel
ranks."""
MOST_PADDING = 0.05
"""The share of a bucket that :func:`owner_places` may leave empty in order to have tensors whole;
padding is sent, too."""
_PADDING_STEPS = 10


@dataclass(frozen=True)
class Place:
    """The place of a tensor in a buffer each of whose buckets is cut into equal shares, one for
    each data-parallel rank."""

    start: int
    """The tensor's first element, counted from the start of its bucket."""
    numel: int
    share: int
    """The number of elements of the bucket on each rank, including padding."""
    bucket: int = 0
    """The number of the bucket in its buffer."""

    def ranks(self) -> range:
        """The data-parallel ranks that own some of the tensor."""
        return range(self.start // self.share, (self.start + self.numel - 1) // self.share + 1)

    def owned(self, data_rank: int) -> tuple[int, int]:
        """The flat range of the tensor that a rank owns; it is empty where first >= last."""
        low = data_rank * self.share - self.start
        return max(0, low), min(self.numel, low + self.share)


@dataclass(frozen=True)
class BufferTensor:
    """One tensor of a buffer, as one tensor-parallel rank has it."""

    name: str
    numel: int
    rule: str = ADAMW
    """The rule that updates it; a tensor of AdamW may be cut anywhere."""
    alone: bool = False
    """Whether it has a bucket to itself. So has an embedding of which two pipeline stages have
    copies: their gradients are added where each rank owns the same part of both."""
    first: bool = False
    """Whether it lies at the start of its bucket, whole in the first share. So does that embedding,
    where it fits on both stages."""


def rounded_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def _in_a_row(numels: Sequence[int]) -> tuple[list[int], int]:
    """The starts of tensors that lie one after the other, each at a multiple of 64, and the end of
    the last one."""
    starts, end = [], 0
    for numel in numels:
        starts.append(rounded_up(end, _TENSOR_ALIGNMENT))
        end = starts[-1] + numel
    return starts, end


def _equal_share(numel: int, data_ranks: int) -> int:
    return rounded_up(numel, math.lcm(data_ranks, _BUCKET_ALIGNMENT)) // data_ranks


def owner_places(tensors: Sequence[BufferTensor], data_ranks: int) -> list[Place]:
    """The places of tensors in the buffer of a model chunk; under Muon-NSGD tensors lie whole in a
    rank's share.

    Buckets are made of consecutive tensors in reverse order of registration, as Megatron-core takes
    them. There are three kinds of bucket: one tensor that is ``alone``; tensors of AdamW, which are
    laid out as :func:`distributed_optimizer_places` says; and the other tensors. Of these, as many
    as possible lie whole inside one share while padding is at most :data:`MOST_PADDING`: the
    largest are placed first, each in the share with the most room. Where they do not fit, the
    largest are cut, and lie in a row at the start of the bucket. Shares are equal, and
    Newton-Schulz costs nearly the same for each element of a model's matrices, so this balances
    memory and time.

    Args:
        tensors: the tensors of the chunk in the order of registration. Within a bucket of whole
            tensors the places depend on names and sizes alone.

    Raises:
        RuntimeError: a tensor that has to lie first is larger than a share.
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
    """The indices of the tensors in each bucket, in reverse order of registration."""

    def kind(i: int) -> tuple[int, bool]:
        return (i if tensors[i].alone else -1), tensors[i].rule == ADAMW

    for _, members in itertools.groupby(reversed(range(len(tensors))), key=kind):
        yield list(members)


def _whole_in_shares(numels: Sequence[int], data_ranks: int) -> tuple[list[int], int]:
    """The starts of tensors and the size of a share, with as few tensors cut as fit. The tensors
    are given with the largest first, apart from one that lies at the start."""
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
    """The starts of tensors of which the first ``cut`` lie in a row and each other one inside one
    share; None where they do not fit."""
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
    """The rank that becomes the owner of each tensor of which several ranks hold parts.

    It is the rank that holds the largest part; of several such ranks it is the one that has the
    least so far. The largest tensors choose first.

    Args:
        numels: the number of elements of each whole tensor.
        lengths: for each tensor, the number of elements on each rank that holds some.
        ranks: the number of ranks in the group.
    """
    load, found = [0] * ranks, [0] * len(numels)
    for i in sorted(range(len(numels)), key=lambda i: (-numels[i], i)):
        longest = max(lengths[i].values())
        holders = [rank for rank, length in lengths[i].items() if length == longest]
        found[i] = min(holders, key=lambda rank: (load[rank], rank))
        load[found[i]] += numels[i]
    return found
