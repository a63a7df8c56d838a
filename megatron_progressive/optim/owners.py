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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
_BUCKET_NUMEL, _BUCKET_NUMEL_A_RANK = 40_000_000, 1_000_000
"""What Megatron-core takes for the size of a bucket: large enough for a reduce-scatter to be bound
by bandwidth on each of its ranks, and small enough for the first to start early."""


def bucket_numel(data_ranks: int) -> int | None:
    """The number of elements from which on a bucket is full, for a model whose weights that many
    data-parallel ranks have copies of; None: no bucket ever is, as nothing is exchanged.

    Gradients of a bucket are reduced as soon as the backward pass has made the last of them.
    Megatron-core 0.19.2 has this default (``distributed_data_parallel.py``).
    """
    if data_ranks == 1:
        return None
    return max(_BUCKET_NUMEL, _BUCKET_NUMEL_A_RANK * data_ranks)


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


def owner_places(
    tensors: Sequence[BufferTensor], data_ranks: int, bucket: int | None = None
) -> list[Place]:
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
        bucket: the number of elements from which on a bucket is full (:func:`bucket_numel`). A
            bucket of whole tensors is larger where that cuts fewer of them; with None it takes all
            consecutive tensors of its kind.

    Raises:
        RuntimeError: a tensor that has to lie first is larger than a share.
    """
    places: dict[int, Place] = {}
    number = 0
    for members in _kinds(tensors):
        first = tensors[members[0]]
        if first.alone or first.rule == ADAMW:
            laid_out = [
                _in_order(part, tensors, data_ranks) for part in _full(members, tensors, bucket)
            ]
        else:
            laid_out = _whole(members, tensors, data_ranks, bucket)
        for found in laid_out:
            places |= {i: replace(place, bucket=number) for i, place in found.items()}
            number += 1
    for i, tensor in enumerate(tensors):
        if tensor.first and places[i].owned(0) != (0, tensor.numel):
            raise RuntimeError(f"{tensor.name}: does not fit into the first of the shares")
    return [places[i] for i in range(len(tensors))]


def _kinds(tensors: Sequence[BufferTensor]) -> Iterator[list[int]]:
    """The indices of consecutive tensors of one kind, in reverse order of registration."""

    def kind(i: int) -> tuple[int, bool]:
        return (i if tensors[i].alone else -1), tensors[i].rule == ADAMW

    for _, members in itertools.groupby(reversed(range(len(tensors))), key=kind):
        yield list(members)


def _full(
    members: list[int], tensors: Sequence[BufferTensor], bucket: int | None
) -> Iterator[list[int]]:
    """Consecutive tensors of AdamW in buckets: each is full with the tensor that reaches
    ``bucket``."""
    part: list[int] = []
    end = 0
    for i in members:
        part.append(i)
        end = rounded_up(end, _TENSOR_ALIGNMENT) + tensors[i].numel
        if bucket is not None and end >= bucket:
            yield part
            part, end = [], 0
    if part:
        yield part


def _in_order(
    members: list[int], tensors: Sequence[BufferTensor], data_ranks: int
) -> dict[int, Place]:
    """The places of a bucket's tensors that may be cut anywhere."""
    starts, end = _in_a_row([tensors[i].numel for i in members])
    share = _equal_share(end, data_ranks)
    return {i: Place(at, tensors[i].numel, share) for i, at in zip(members, starts, strict=True)}


def _whole(
    members: list[int], tensors: Sequence[BufferTensor], data_ranks: int, bucket: int | None
) -> list[dict[int, Place]]:
    """The places, in as many buckets as cut no more than one bucket does, of tensors that are to
    lie whole in shares: a share can hold what is at most as large as a rank's part of a bucket."""
    one = [_largest_first(members, tensors, data_ranks)]
    if bucket is None:
        return one
    apart = [
        places
        for part in _apart_from_large(members, tensors, data_ranks, bucket)
        for places in _divided(part, tensors, data_ranks, bucket)
    ]
    found = [apart, _divided(members, tensors, data_ranks, bucket), one]
    fitting = [f for f in found if _cut(f) <= _cut(one) and _first_fit(f, tensors)]
    return max(fitting, key=len, default=one)


def _first_fit(buckets: list[dict[int, Place]], tensors: Sequence[BufferTensor]) -> bool:
    """Whether tensors that have to lie first lie whole in the first share."""
    places = {i: place for bucket in buckets for i, place in bucket.items() if tensors[i].first}
    return all(place.owned(0) == (0, place.numel) for place in places.values())


def _apart_from_large(
    members: list[int], tensors: Sequence[BufferTensor], data_ranks: int, bucket: int
) -> Iterator[list[int]]:
    """Consecutive tensors, parted at those that are larger than any share, which are cut anyway.
    What would not fill a bucket stays with the tensor before it."""
    total = sum(tensors[i].numel for i in members)
    parts: list[list[int]] = [[]]
    for i in members:
        large = tensors[i].numel * data_ranks > total
        filled = sum(tensors[j].numel for j in parts[-1]) >= bucket
        if parts[-1] and filled and (large or tensors[parts[-1][0]].numel * data_ranks > total):
            parts.append([])
        parts[-1].append(i)
    yield from parts


def _divided(
    members: list[int], tensors: Sequence[BufferTensor], data_ranks: int, bucket: int
) -> list[dict[int, Place]]:
    """The places in equal buckets, as many as cut no more than one does."""
    numels = {i: tensors[i].numel for i in members}
    total = sum(numels.values())
    one = [_largest_first(members, tensors, data_ranks)]
    largest = max((n for n in numels.values() if n * data_ranks <= total), default=0)
    count = total // max(bucket, largest * data_ranks)
    while count > 1:
        parts: dict[int, list[int]] = defaultdict(list)
        before = 0
        for i in members:
            parts[(2 * before + numels[i]) * count // (2 * total)].append(i)  # by its middle
            before += numels[i]
        several = [_largest_first(part, tensors, data_ranks) for part in parts.values()]
        if _cut(several) <= _cut(one):
            return several
        count //= 2
    return one


def _cut(buckets: list[dict[int, Place]]) -> int:
    """The number of elements of tensors of which several ranks own parts."""
    places = [place for bucket in buckets for place in bucket.values()]
    return sum(place.numel for place in places if len(place.ranks()) > 1)


def _largest_first(
    members: list[int], tensors: Sequence[BufferTensor], data_ranks: int
) -> dict[int, Place]:
    """The places of one bucket's tensors, whole in shares as far as they fit."""
    order = sorted(
        members, key=lambda i: (not tensors[i].first, -tensors[i].numel, tensors[i].name)
    )
    starts, share = _whole_in_shares([tensors[i].numel for i in order], data_ranks)
    return {i: Place(at, tensors[i].numel, share) for i, at in zip(order, starts, strict=True)}


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
