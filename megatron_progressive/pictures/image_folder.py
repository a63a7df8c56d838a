"""The images of a folder: ``train/CLASS/*.png`` and ``val/CLASS/*.png``, read with Pillow.

The shorter side of a picture is scaled to the model's size, and the middle is cut out. Training
pictures are scaled a little larger, cut out at a random place and mirrored at random, as the seed
and the number of the draw decide.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_progressive.config import ConfigError
from megatron_progressive.pictures.shapes import Pictures

TRAIN, VALIDATION = "train", "val"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_LARGER = 1.125  # 36 pixels for 32, 252 for 224


@dataclass(frozen=True)
class Folder:
    """The files of a folder, in the order of class and name."""

    classes: tuple[str, ...]
    files: dict[str, list[Path]]
    """The files of each split."""
    labels: dict[str, NDArray[np.int64]]
    """The class of each file, by split."""


def open_folder(corpus: str, num_classes: int) -> Folder:
    """The files of an image folder.

    Args:
        corpus: the path of the folder.
        num_classes: the number of classes of the model.

    Raises:
        ConfigError: there is no such folder, a split has no classes, a class has no pictures, the
            number of classes is another one, or the training split lacks a class of the validation
            split.
    """
    root = Path(corpus)
    accepted = (
        f"accepted: shapes, or a folder with {TRAIN}/CLASS/*.png and {VALIDATION}/CLASS/*.png"
    )
    if not root.is_dir():
        raise ConfigError(f"data.corpus: got {corpus}, which is no folder; {accepted}")
    found = {split: _pictures(root / split) for split in (TRAIN, VALIDATION)}
    for split, pictures in found.items():
        if not pictures:
            raise ConfigError(
                f"data.corpus: got {corpus}, which has no class in {split}; {accepted}"
            )
        for name, files in pictures.items():
            if not files:
                raise ConfigError(
                    f"data.corpus: got {corpus}, which has no picture in {split}/{name}; accepted: "
                    f"{', '.join(SUFFIXES)} files there"
                )
    classes = tuple(sorted(found[TRAIN]))
    for name in sorted(found[VALIDATION]):
        if name not in classes:
            raise ConfigError(
                f"data.corpus: got {corpus}, whose {VALIDATION}/{name} has no {TRAIN}/{name}; "
                f"accepted: classes that {TRAIN} has, too"
            )
    if len(classes) != num_classes:
        raise ConfigError(
            f"data.num_classes: got {num_classes}; accepted: {len(classes)} (the classes in "
            f"{root / TRAIN})"
        )
    number = {name: label for label, name in enumerate(classes)}
    pairs = {
        split: [(file, number[name]) for name in sorted(pictures) for file in pictures[name]]
        for split, pictures in found.items()
    }
    return Folder(
        classes,
        {split: [file for file, _ in files] for split, files in pairs.items()},
        {split: np.array([label for _, label in files]) for split, files in pairs.items()},
    )


def _pictures(split: Path) -> dict[str, list[Path]]:
    """The files of each class in a split."""
    if not split.is_dir():
        return {}
    return {
        entry.name: sorted(
            Path(file.path) for file in os.scandir(entry) if file.name.lower().endswith(SUFFIXES)
        )
        for entry in os.scandir(split)
        if entry.is_dir()
    }


class ImageFolder:
    """The training and the validation split of a folder.

    Args:
        seed: the seed of the order and of the cuts in training.
        size: the side of a picture in pixels.
    """

    def __init__(self, folder: Folder, seed: int, size: int) -> None:
        self.folder, self.seed, self.size = folder, seed, size

    @property
    def validation_samples(self) -> int:
        """The number of pictures in the validation split."""
        return len(self.folder.files[VALIDATION])

    def train(self, first: int, count: int) -> Pictures:
        """Draws ``first`` to ``first + count`` of training: each epoch has every picture once."""
        from megatron_progressive.runtime.draws import order

        draws = np.arange(first, first + count, dtype=np.int64)
        numbers = order(self.seed, draws, len(self.folder.files[TRAIN]))
        return self._read(TRAIN, numbers, [int(draw) for draw in draws])

    def validation(self, first: int, count: int) -> Pictures:
        """Pictures ``first`` to ``first + count`` of validation, where the first one follows the
        last.

        They come in an order that mixes the classes, the same for every seed.
        """
        from megatron_progressive.runtime.draws import order

        size = len(self.folder.files[VALIDATION])
        numbers = np.arange(first, first + count, dtype=np.int64) % size
        return self._read(VALIDATION, order(0, numbers, size), None)

    def _read(self, split: str, numbers: NDArray[np.int64], draws: list[int] | None) -> Pictures:
        files = self.folder.files[split]
        pixels = np.empty((len(numbers), 3, self.size, self.size), np.float32)
        for row, number in enumerate(numbers):
            random = None if draws is None else _random(self.seed, draws[row])
            pixels[row] = _picture(files[int(number)], self.size, random)
        return pixels, self.folder.labels[split][numbers]


def _random(seed: int, draw: int) -> tuple[float, float, bool]:
    """Where the picture of one draw is cut out, across and down, from 0 to 1, and whether it is
    mirrored."""
    digest = hashlib.blake2b(f"cut/{seed}/{draw}".encode(), digest_size=9).digest()
    across, down = (int.from_bytes(part, "little") / 2**32 for part in (digest[:4], digest[4:8]))
    return across, down, bool(digest[8] & 1)


def _picture(
    file: Path, size: int, random: tuple[float, float, bool] | None
) -> NDArray[np.float32]:
    """One picture, as [3, size, size] with values from 0 to 1."""
    from PIL import Image

    across, down, mirrored = random or (0.5, 0.5, False)
    target = size if random is None else round(_LARGER * size)
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    scale = target / min(image.size)
    width, height = (max(target, round(scale * side)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = int(across * (width - size + 1)), int(down * (height - size + 1))
    values = np.asarray(image.crop((left, top, left + size, top + size)), np.float32)
    values = values[:, ::-1] if mirrored else values
    return values.transpose(2, 0, 1) / np.float32(255)
