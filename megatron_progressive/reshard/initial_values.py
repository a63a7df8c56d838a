"""Initial weights from a counter-based generator keyed by (seed, generation, global name).

Element e of a tensor depends on that key and e alone, so each rank fills just the boxes that
it holds and every layout gets the same bits. The generation is 0 at the start of a run and
counts its expansions: layers move to other numbers when new ones come below them, and a new
layer must not repeat the values that the layer of its number once had.

Element e is one 64-bit word of Philox 4x64 (Salmon et al. 2011, SC11), of which the upper 53 bits
are a uniform number between 0 and 1, through the inverse of the normal distribution in fp64
(cephes' ``ndtri``), times the standard deviation, rounded to fp32. It is the inverse that takes
the time: each element that a rank keeps is drawn once, whichever slots hold it, and no other.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from scipy.special import ndtri

from megatron_progressive.models.base import TensorSpec
from megatron_progressive.reshard.boxes import WEIGHT_SLOTS, Box, Piece, ShardedState, disjoint
from megatron_progressive.runtime.environment import cores_of_this_rank
from megatron_progressive.runtime.memory import Staging

_WORDS = 4  # 64-bit words that Philox 4x64 makes of one counter
_CHUNK = 1 << 15
"""Elements that a thread draws at a time: its fp64 working memory stays in the core's cache."""
_GAP = 256
"""Elements between two runs, up to which their uniform numbers are made and left out: going to
another counter takes as long."""
_HALF = 2.0**-54
"""Half of the distance of the uniform numbers, which are moved away from 0 by it."""
_STAGED = 1 << 22  # elements that are drawn before they go to where they belong


def tensor_key(seed: int, generation: int, name: str) -> int:
    """The generator's 128-bit key for one global tensor."""
    text = f"{seed}/{generation}/{name}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class _Runs:
    """The elements of a box as runs of equal length, in order: each is contiguous in the tensor."""

    starts: NDArray[np.int64]
    length: int

    @staticmethod
    def of(box: Box, shape: Sequence[int]) -> _Runs:
        length, axis = 1, len(shape)
        whole = True  # of the axes behind, the box has all
        while axis and whole:
            axis -= 1
            length *= box.shape[axis]
            whole = box.shape[axis] == shape[axis]
        starts = np.zeros(1, np.int64)
        for i in range(len(shape)):
            extent = np.arange(box.shape[i]) if i < axis else np.zeros(1, np.int64)
            step = math.prod(shape[i + 1 :])
            starts = (starts[:, None] + (extent + box.offset[i]) * step).reshape(-1)
        return _Runs(starts, length)

    def chunks(self) -> Iterator[tuple[int, _Runs]]:
        """Parts of at most :data:`_CHUNK` elements, each with its place among the elements."""
        if self.length >= _CHUNK:
            for number, start in enumerate(self.starts.tolist()):
                for first in range(0, self.length, _CHUNK):
                    count = min(_CHUNK, self.length - first)
                    part = _Runs(np.array([start + first]), count)
                    yield number * self.length + first, part
            return
        rows = _CHUNK // max(1, self.length)
        for row in range(0, len(self.starts), rows):
            yield row * self.length, _Runs(self.starts[row : row + rows], self.length)

    def uniform(self, key: int) -> NDArray[np.float64]:
        """Uniform numbers from 0 to below 1 of the elements: float64 [runs, length]."""
        first, length = int(self.starts[0]), self.length
        generator = Philox(key=key, counter=first // _WORDS)
        draw = Generator(generator).random
        gaps = np.diff(self.starts) - length
        if not len(gaps) or (gaps.max() <= _GAP and (gaps == gaps[0]).all()):
            stride = length + (int(gaps[0]) if len(gaps) else 0)
            skip, rows = first % _WORDS, len(self.starts)
            drawn = draw(skip + stride * rows)[skip:]
            return np.ascontiguousarray(drawn.reshape(rows, stride)[:, :length])
        found, counter = np.empty((len(self.starts), length)), first // _WORDS
        for row, start in zip(found, self.starts.tolist(), strict=True):
            generator.advance(start // _WORDS - counter)
            skip = start % _WORDS
            row[:] = draw(skip + length)[skip:]
            # what is left of the last counter's words is dropped by the next advance
            counter = start // _WORDS + -(-(skip + length) // _WORDS)
        return found


def _draw(values: NDArray[np.float32], runs: _Runs, key: int, std: float) -> None:
    """Write normal values with a standard deviation to ``values`` (contiguous), on all cores that
    this rank has: the generator and the inverse leave the interpreter to other threads."""
    flat = values.reshape(-1)

    def fill(part: tuple[int, _Runs]) -> None:
        place, chunk = part
        # One word an element, through the inverse of the normal distribution: rejection
        # methods would make an element depend on how many came before it.
        drawn = chunk.uniform(key).reshape(-1)
        drawn += _HALF
        ndtri(drawn, out=drawn)
        drawn *= std
        flat[place : place + drawn.size] = drawn

    threads = min(cores_of_this_rank(), values.size // (4 * _CHUNK))
    if threads <= 1:
        for part in runs.chunks():
            fill(part)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(fill, runs.chunks()):
            pass  # raises what a thread has raised


def initial_values(
    seed: int,
    generation: int,
    name: str,
    spec: TensorSpec,
    box: Box,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Initial values of one box of a global tensor: fp32, of the box's shape, on the CPU.

    Args:
        out: where they are written: contiguous fp32 on the CPU, of as many elements.

    Raises:
        ValueError: an init that is not known.
    """
    values = torch.empty(box.shape) if out is None else out.view(box.shape)
    if spec.init == "zeros":
        return values.zero_()
    if spec.init == "ones":
        return values.fill_(spec.gain)
    if spec.init != "normal":
        raise ValueError(f"{name}: unknown init {spec.init!r}")
    live = values
    if spec.live_rows is not None:
        rows = min(max(0, spec.live_rows - box.offset[0]), box.shape[0])
        values[rows:] = 0
        box, live = box.along(0, box.offset[0], rows), values[:rows]
    if live.numel():
        key = tensor_key(seed, generation, name)
        _draw(live.numpy(), _Runs.of(box, spec.shape), key, spec.std)
    return values


def initialise(
    pieces: Sequence[Piece],
    table: dict[str, TensorSpec],
    seed: int,
    generation: int,
) -> None:
    """Write the initial values (fp32, then rounded to the piece's type) of weight pieces.

    What several pieces have of one tensor, as the weight that the model computes with and the
    master weights of some of it, is drawn once.

    Raises:
        ValueError: a piece is no weight.
    """
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        if piece.slot not in WEIGHT_SLOTS:
            raise ValueError(f"{piece.name}/{piece.slot} is not a weight")
        by_name[piece.name].append(piece)
    largest = max((piece.box.numel for piece in pieces), default=0)
    staging = Staging(min(_STAGED, largest))
    for name, members in by_name.items():
        boxes = disjoint(piece.box for piece in members)
        for part in (part for box in boxes for part in box.split(_STAGED)):
            device = members[0].data.device
            values = staging.buffer(part.numel, device)
            values = initial_values(seed, generation, name, table[name], part, values)
            values = staging.sent(values, device)
            for piece in members:
                if (common := piece.box.intersect(part)) is not None:
                    target = piece.data[common.slices_within(piece.box)]
                    target.copy_(values[common.slices_within(part)])


def initialise_all(
    state: ShardedState, table: dict[str, TensorSpec], seed: int, generation: int = 0
) -> None:
    """Initialise every weight of a state; optimizer slots are left as they are."""
    weights = [piece for piece in state.pieces if piece.slot in WEIGHT_SLOTS]
    initialise(weights, table, seed, generation)
