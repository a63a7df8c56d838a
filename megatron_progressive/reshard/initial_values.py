"""Initial weights from a counter-based generator, keyed by (seed, generation, global name).

Element e of a tensor depends on nothing but that key and e, so each rank fills just the boxes that
it holds, and every layout gets the same bits. The generation is 0 at the start of a run and counts
its expansions: layers move to other numbers when new ones come below them, and a new layer must not
repeat the values that the layer of its number once had.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.random import Philox
from scipy.special import ndtri

from megatron_progressive.models.base import TensorSpec
from megatron_progressive.reshard.boxes import WEIGHT_SLOTS, Box, Piece, ShardedState

_WORDS = 4  # 64-bit words that Philox 4x64 makes of one counter
_CHUNK = 1 << 20  # elements drawn at once: bounds the fp64 working memory


def _uniform_words(key: int, start: int, count: int) -> np.ndarray:
    """Words [start, start + count) of the stream of ``key``, as uint64 [count]."""
    generator = Philox(key=key, counter=start // _WORDS)
    skip = start % _WORDS
    words: np.ndarray = generator.random_raw(skip + count)[skip:]
    return words


def _normal(key: int, start: int, count: int) -> np.ndarray:
    """Standard normal elements [start, start + count) of a tensor, as float64 [count].

    Each element takes one word, through the inverse of the normal distribution: with a rejection
    method an element would depend on how many words the elements before it took.
    """
    uniform = (
        (_uniform_words(key, start, count) >> np.uint64(11)).astype(np.float64) + 0.5
    ) * 2.0**-53
    normal: np.ndarray = ndtri(uniform)
    return normal


def tensor_key(seed: int, generation: int, name: str) -> int:
    """The generator's 128-bit key for one global tensor."""
    text = f"{seed}/{generation}/{name}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def initial_values(
    seed: int, generation: int, name: str, spec: TensorSpec, box: Box
) -> torch.Tensor:
    """The initial values of one box of a global tensor: fp32, of the box's shape, on the CPU."""
    if spec.init == "zeros":
        return torch.zeros(box.shape)
    if spec.init == "ones":
        return torch.full(box.shape, spec.gain)
    if spec.init != "normal":
        raise ValueError(f"{name}: unknown init {spec.init!r}")
    key = tensor_key(seed, generation, name)
    values = np.empty(box.shape, dtype=np.float32)
    if len(box.shape) < 3:
        _fill(values, key, spec.std, spec.shape, box.offset)
    else:
        for index in np.ndindex(*box.shape[:-2]):
            place = tuple(o + i for o, i in zip(box.offset, index, strict=False))
            matrix = int(np.ravel_multi_index(place, spec.shape[:-2]))
            base = matrix * math.prod(spec.shape[-2:])
            _fill(values[index], key, spec.std, spec.shape[-2:], box.offset[-2:], base)
    if spec.live_rows is not None:
        values[max(0, spec.live_rows - box.offset[0]) :] = 0
    return torch.from_numpy(values)


def _fill(
    values: np.ndarray,
    key: int,
    std: float,
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    base: int = 0,
) -> None:
    """Draw a box of a tensor of at most two axes, whose first element is element ``base``.

    Rows are drawn at their full length: a box that is cut along the second axis (row-parallel
    weights) throws away the columns of the other ranks.
    """
    row_length = math.prod(shape[1:])
    inner = tuple(slice(o, o + n) for o, n in zip(offset[1:], values.shape[1:], strict=True))
    rows_at_once = max(1, _CHUNK // max(1, row_length))
    for row in range(0, values.shape[0], rows_at_once):
        rows = min(rows_at_once, values.shape[0] - row)
        drawn = _normal(key, base + (offset[0] + row) * row_length, rows * row_length)
        values[row : row + rows] = drawn.reshape(rows, *shape[1:])[(slice(None), *inner)] * std


def initialise(piece: Piece, spec: TensorSpec, seed: int, generation: int) -> None:
    """Write the initial values of a weight piece, in fp32 and then rounded to the piece's type."""
    if piece.slot not in WEIGHT_SLOTS:
        raise ValueError(f"{piece.name}/{piece.slot} is not a weight")
    piece.data.copy_(initial_values(seed, generation, piece.name, spec, piece.box))


def initialise_all(
    state: ShardedState, table: dict[str, TensorSpec], seed: int, generation: int = 0
) -> None:
    """Initialise every weight of a state; optimizer slots stay as they are."""
    for piece in state.pieces:
        if piece.slot in WEIGHT_SLOTS:
            initialise(piece, table[piece.name], seed, generation)
