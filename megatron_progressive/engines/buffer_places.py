"""Where tensors lie in the flat buffers that data-parallel ranks divide. Needs no torch.

Megatron-core's distributed optimizer and DeepSpeed's ZeRO cut a buffer into equal shares, one for
each rank, wherever the cuts fall in the tensors. The layout that Muon-NSGD has instead is decided
in :mod:`megatron_progressive.optim.owners`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from megatron_progressive.optim.owners import BufferTensor, Place, owner_places, rounded_up

_ZERO_ALIGNMENT = 2
"""The number of elements of which DeepSpeed's share of a flat group is a multiple."""


def distributed_optimizer_places(
    numels: Sequence[int], alone: Sequence[bool], data_ranks: int, bucket: int | None = None
) -> list[Place]:
    """The places of tensors in a model chunk's buffer of Megatron-core's distributed optimizer.

    The buffer has the tensors in reverse order, each at a multiple of 64 elements. A bucket ends
    with the tensor that makes it full. A tensor with ``alone`` (the embedding that two pipeline
    stages share) has a bucket of its own. The end of a bucket is padded to a multiple of 128 and of
    the ranks.

    Args:
        numels: the number of elements of each tensor, in the order of registration.
        bucket: the number of elements from which on a bucket is full
            (:func:`.optim.owners.bucket_numel`); with None none ever is.
    """
    tensors = [BufferTensor("", n, alone=a) for n, a in zip(numels, alone, strict=True)]
    return owner_places(tensors, data_ranks, bucket)


def zero_places(numels: Sequence[int], data_ranks: int) -> list[Place]:
    """The places of tensors in DeepSpeed's flat group (ZeRO stages 1 and 2): one after the other,
    in the order of registration, with the end padded to a multiple of 2 x ranks."""
    share = rounded_up(sum(numels), _ZERO_ALIGNMENT * data_ranks) // data_ranks
    starts = itertools.accumulate(numels, initial=0)
    return [Place(start, numel, share) for start, numel in zip(starts, numels, strict=False)]


def zero_3_places(numels: Sequence[int], data_ranks: int) -> list[Place]:
    """The places of tensors under DeepSpeed's ZeRO stage 3, which cuts each tensor on its own."""
    return [Place(0, numel, -(-numel // data_ranks)) for numel in numels]
