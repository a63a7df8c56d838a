"""Pictures of ten kinds of figures, drawn as they are read: a task that can be learned without a
download.

Each picture is one figure at a random place, size and angle, brighter than its ground, in random
colours and under noise. It depends on nothing but the split, its number and, in training, the seed.
Training never draws a picture twice; validation is the same for every seed.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

NAME = "shapes"
CLASSES = ("disc", "ring", "square", "frame", "triangle", "cross", "stripes", "checks", "dots",
           "pair")  # fmt: skip

_FINER = 2  # each pixel is the mean of this many a side
_NUMBERS = 12  # random numbers of a picture beside its noise
_NOISE = 0.2  # largest change of a pixel, of the range from black to white
_GROUND = 0.4  # brightest ground
_CONTRAST = 0.2, 0.6  # how much brighter the figure is, in each channel

Pictures = tuple[NDArray[np.float32], NDArray[np.int64]]
"""The pixels [n, 3, size, size], from 0 to 1, and the labels [n] of some pictures."""


class Shapes:
    """The training and the validation split.

    Args:
        seed: the seed of the training pictures.
        size: the side of a picture in pixels.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.size = size
        self._train, self._validation = _key(f"train/{seed}"), _key("validation")

    validation_samples: int | None = None
    """None: validation has as many pictures as one asks for, since they are drawn."""

    def train(self, first: int, count: int) -> Pictures:
        """Pictures ``first`` to ``first + count`` of training."""
        return _draw(self._train, first, count, self.size)

    def validation(self, first: int, count: int) -> Pictures:
        """Pictures ``first`` to ``first + count`` of validation."""
        return _draw(self._validation, first, count, self.size)


def _key(split: str) -> int:
    digest = hashlib.blake2b(f"{NAME}/{split}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _draw(key: int, first: int, count: int, size: int) -> Pictures:
    # raw words of the generator, whose values no version of NumPy changes
    noise_words = -(-3 * size * size // 8)
    words = np.empty((count, _NUMBERS + noise_words), np.uint64)
    for row, number in enumerate(range(first, first + count)):
        words[row] = Philox(key=(key << 64) | number).random_raw(words.shape[1])
    uniform = (words[:, :_NUMBERS] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    labels = (uniform[:, 0] * len(CLASSES)).astype(np.int64)
    inside = _figures(labels, uniform, size)[:, None]
    ground, colour = _colours(uniform)
    noise = words[:, _NUMBERS:].astype("<u8").view(np.uint8)[:, : 3 * size * size]
    shift = (noise.reshape(count, 3, size, size) / 255 - 0.5) * (2 * _NOISE)
    pixels = ground * (1 - inside) + colour * inside + shift
    return np.clip(pixels, 0, 1).astype(np.float32), labels


def _colours(uniform: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The colours of the ground and of the figure, each [n, 3, 1, 1]."""
    ground, (least, most) = _GROUND * uniform[:, 4:7, None, None], _CONTRAST
    return ground, ground + least + (most - least) * uniform[:, 7:10, None, None]


def _figures(
    labels: NDArray[np.int64], uniform: NDArray[np.float64], size: int
) -> NDArray[np.float64]:
    """How much of each pixel the figure covers, from 0 to 1, as [n, size, size]."""
    fine = (np.arange(size * _FINER) + 0.5) * (2 / (size * _FINER)) - 1
    half = (0.5 + 0.3 * uniform[:, 1])[:, None, None]  # half of the figure's width
    x = (fine[None, None, :] - 0.25 * (2 * uniform[:, 2, None, None] - 1)) / half
    y = (fine[None, :, None] - 0.25 * (2 * uniform[:, 3, None, None] - 1)) / half
    angle = (2 * np.pi * uniform[:, 10])[:, None, None]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    covered = np.zeros(u.shape, bool)
    for label, name in enumerate(CLASSES):
        mine = labels == label
        covered[mine] = _covers(name, u[mine], v[mine])
    n = len(labels)
    return covered.reshape(n, size, _FINER, size, _FINER).mean((2, 4))


def _covers(name: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether the points (u, v) lie in a figure of half width 1."""
    radius, side = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    bars = np.cos(2.5 * np.pi * u)
    if name == "disc":
        return radius < 1
    if name == "ring":
        return (radius < 1) & (radius > 0.55)
    if name == "square":
        return side < 0.85
    if name == "frame":
        return (side < 0.9) & (side > 0.5)
    if name == "triangle":
        return (v > -0.6) & (v + 1.73 * np.abs(u) < 1.1)
    if name == "cross":
        return (side < 1) & (np.minimum(np.abs(u), np.abs(v)) < 0.3)
    if name == "stripes":
        return (side < 1) & (bars > 0)
    if name == "checks":
        return (side < 1) & (u * v > 0)
    if name == "dots":
        return np.hypot(np.abs(u) - 0.55, np.abs(v) - 0.55) < 0.35
    return np.hypot(np.abs(u) - 0.55, v) < 0.45  # pair
