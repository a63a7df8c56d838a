"""The order in which training draws samples, as a function of the seed and of their numbers."""

from __future__ import annotations

import hashlib
import struct
from typing import overload

import numpy as np
from numpy.typing import NDArray

# With 8, pairs of draws are visibly uneven in splits of 6 or 8 samples; with 12 no more.
_ROUNDS = 16


@overload
def order(seed: int, numbers: int, size: int, part: int = 0) -> int: ...
@overload
def order(seed: int, numbers: NDArray[np.int64], size: int, part: int = 0) -> NDArray[np.int64]: ...
def order(
    seed: int, numbers: int | NDArray[np.int64], size: int, part: int = 0
) -> int | NDArray[np.int64]:
    """The number of the sample that each draw of training takes.

    Draw ``n`` is in epoch ``n // size``; every epoch is a permutation of ``range(size)`` keyed by
    (seed, epoch), and is never stored: a Feistel network permutes the least power of two that holds
    ``size``, and what lands outside walks on until it is inside (Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains", methods 2 and 3).

    Args:
        seed: the run's ``run.seed``.
        numbers: the numbers of draws, from 0, as one number or an array of any shape.
        size: the number of samples in the split.
        part: the place of the corpus in a mixture, each part of which has an order of its own.

    Returns:
        Sample numbers in ``range(size)``, of the shape of ``numbers``.

    Raises:
        ValueError: a draw is negative, or there are no samples.
    """
    draws = np.asarray(numbers, dtype=np.int64)
    if size < 1 or (draws.size and draws.min() < 0):
        raise ValueError(f"draws from {draws.min() if draws.size else 0} of {size} samples")
    epochs, places = np.divmod(draws, size)
    result = np.empty_like(places)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        result[mine] = _permuted(places[mine], size, _round_keys(seed, int(epoch), part))
    return int(result) if isinstance(numbers, int) else result


def _round_keys(seed: int, epoch: int, part: int) -> list[np.uint64]:
    message = b"order of samples" + struct.pack("<QQ", seed, epoch)
    message += struct.pack("<Q", part) if part else b""
    digest = hashlib.shake_128(message).digest(8 * _ROUNDS)
    return [np.uint64(key) for key in struct.unpack(f"<{_ROUNDS}Q", digest)]


def _permuted(places: NDArray[np.int64], size: int, keys: list[np.uint64]) -> NDArray[np.int64]:
    """``places`` under the permutation of ``range(size)`` that ``keys`` choose."""
    bits = (size - 1).bit_length()
    values = _feistel(places.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], bits, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of the numbers of ``bits`` bits. Each round adds a hash of one half to the
    other half, which the same round undoes."""
    low_bits = np.uint64((bits + 1) // 2)
    low_mask = np.uint64((1 << ((bits + 1) // 2)) - 1)
    high_mask = np.uint64((1 << (bits // 2)) - 1)
    high, low = values >> low_bits, values & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            high = high ^ (_mixed(low ^ key) & high_mask)
        else:
            low = low ^ (_mixed(high ^ key) & low_mask)
    return (high << low_bits) | low


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014; constants of Stafford's mix 13)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
