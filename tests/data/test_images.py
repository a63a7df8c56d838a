"""Images: functions of seed and number, held out, and what a folder must have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_progressive.config import ConfigError, RunConfig, from_dict
from megatron_progressive.data import check, open_data, prepare
from megatron_progressive.pictures.shapes import CLASSES, Shapes

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def image_folder(
    root: Path, classes: list[str], each: int = 6, sides: tuple[int, int] = (20, 14)
) -> Path:
    """A folder of one-colour pictures; the last pixel row is white, so that cuts can be told."""
    for split in ("train", "val"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(each):
                pixels = np.empty((sides[1], sides[0], 3), np.uint8)
                pixels[:] = COLOURS[name]
                pixels[-1] = 255
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def configured(corpus: str, *words: str) -> RunConfig:
    values = {"model": {"family": "resnet"}, "data": {"corpus": corpus, "image_size": 12}}
    return from_dict(values, list(words))


def test_pictures_are_functions_of_seed_and_number() -> None:
    shapes = Shapes(7, 16)
    pixels, labels = shapes.train(5, 40)
    for first in (5, 17, 44):  # however a batch is cut
        one, label = shapes.train(first, 1)
        assert np.array_equal(one[0], pixels[first - 5])
        assert label[0] == labels[first - 5]
    assert pixels.dtype == np.float32
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert not np.array_equal(Shapes(8, 16).train(5, 40)[0], pixels)
    held_out = shapes.validation(0, 40)
    assert np.array_equal(Shapes(8, 16).validation(0, 40)[0], held_out[0])
    seen = {picture.tobytes() for picture in shapes.train(0, 500)[0]}
    assert len(seen) == 500
    assert not seen & {picture.tobytes() for picture in held_out[0]}
    counts = np.bincount(shapes.train(0, 2000)[1], minlength=len(CLASSES))
    assert counts.min() > 140


def test_shapes_stay_as_they_are() -> None:
    """A change of these would silently change what every run trains on."""
    pixels, labels = Shapes(1, 16).train(0, 4)
    assert labels.tolist() == [6, 0, 1, 9]
    assert float(pixels.sum()) == pytest.approx(913.16, abs=0.01)


def test_a_folder_is_read_by_class(tmp_path: Path) -> None:
    config = configured(str(image_folder(tmp_path, [*COLOURS])), "data.num_classes=3")
    check(config)
    assert prepare(config) is None
    data = open_data(config)
    pixels, labels = data.train_batch(0, 18)
    assert pixels.shape == (18, 3, 12, 12)
    assert pixels.dtype == torch.float32
    assert sorted(labels.tolist()) == sorted([0, 1, 2] * 6)  # an epoch has each picture once
    for picture, label in zip(pixels, labels, strict=True):
        channel = {0: 2, 1: 1, 2: 0}[int(label)]  # classes in order: blue, green, red
        assert int(picture[:, 3].mean(1).argmax()) == channel
    again = open_data(config).train_batch(3, 5)
    assert torch.equal(again.pixels, pixels[3:8])
    held = data.validation_batch(0, 18)
    assert sorted(held.labels.tolist()) == sorted([0, 1, 2] * 6)
    assert torch.equal(data.validation_batch(18, 4).pixels, held.pixels[:4])
    assert len(set(held.labels[:6].tolist())) > 1  # not class by class


def test_training_pictures_are_cut_at_random_and_validation_in_the_middle(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, ["red", "green"], each=1, sides=(14, 28))
    data = open_data(configured(str(folder), "data.num_classes=2"))
    train = data.train_batch(0, 60).pixels
    white = (train[:, 0, -1] > 1.5).all(1) & (train[:, 1, -1] > 1.5).all(1)
    assert 0 < int(white.sum()) < 60  # the last row of a tall picture is sometimes in
    held = data.validation_batch(0, 2).pixels
    assert not bool((held[:, 2] > 1.5).any())  # never in the middle


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ("none", ["data.corpus: got", "is no folder", "train/CLASS"]),
        ("train", ["data.corpus: got", "no class in train"]),
        ("val", ["data.corpus: got", "no class in val"]),
        ("extra", ["data.corpus: got", "val/blue has no train/blue"]),
        ("empty", ["data.corpus: got", "no picture in train/red", ".png"]),
        ("count", ["data.num_classes: got 10", "accepted: 2"]),
    ],
)
def test_what_is_wrong_with_a_folder(tmp_path: Path, change: str, needed: list[str]) -> None:
    root = tmp_path / "images"
    if change != "none":
        image_folder(root, ["red", "green"], each=1)
    if change in ("train", "val"):
        (root / change).rename(tmp_path / "away")
    if change == "extra":
        (root / "val" / "blue").mkdir()
        (root / "val" / "red" / "0.png").rename(root / "val" / "blue" / "0.png")
        (root / "val" / "red").rmdir()
    if change == "empty":
        (root / "train" / "red" / "0.png").unlink()
    words = [] if change == "count" else ["data.num_classes=2"]
    with pytest.raises(ConfigError) as error:
        check(configured(str(root), *words))
    for text in needed:
        assert text in str(error.value)
