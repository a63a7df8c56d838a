"""The labelled images of a run: drawn as they are read (:mod:`.shapes`), or from a folder
(:mod:`.image_folder`). Nothing is prepared beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.models import model_shape
from megatron_progressive.models.families.resnet import ResNetShape
from megatron_progressive.pictures import image_folder, shapes

if TYPE_CHECKING:
    import torch

MEAN, DEVIATION = 0.5, 0.25
"""The mean and the deviation with which pixels, from 0 to 1, are normalised."""


class LabelledImages(NamedTuple):
    """Some images and their labels."""

    pixels: torch.Tensor
    """The normalised pixels, fp32 [n, 3, size, size]."""
    labels: torch.Tensor
    """The classes, int64 [n]."""


class ImageData:
    """The batches of a run, as functions of its seed and of the numbers of samples."""

    def __init__(self, config: RunConfig) -> None:
        shape = _shape(config)
        if config.data.corpus == shapes.NAME:
            self._source: shapes.Shapes | image_folder.ImageFolder = shapes.Shapes(
                config.run.seed, shape.image_size
            )
        else:
            folder = image_folder.open_folder(config.data.corpus, shape.num_classes)
            self._source = image_folder.ImageFolder(folder, config.run.seed, shape.image_size)

    @property
    def validation_samples(self) -> int | None:
        """The number of pictures in the validation split; None where they are drawn."""
        return self._source.validation_samples

    def train_batch(self, first_sample: int, count: int) -> LabelledImages:
        """Draws ``first_sample`` to ``first_sample + count`` of training."""
        return _labelled(*self._source.train(first_sample, count))

    def validation_batch(self, first: int, count: int) -> LabelledImages:
        """Samples ``first`` to ``first + count`` of validation, the same for every seed."""
        return _labelled(*self._source.validation(first, count))


def check(config: RunConfig) -> None:
    """Check that the images can be trained on.

    Raises:
        ConfigError: there is no such folder, or the model or the training split lacks classes.
    """
    shape = _shape(config)
    if config.data.corpus != shapes.NAME:
        image_folder.open_folder(config.data.corpus, shape.num_classes)
    elif shape.num_classes != len(shapes.CLASSES):
        raise ConfigError(
            f"data.num_classes: got {shape.num_classes}; accepted: {len(shapes.CLASSES)} (corpus "
            f"{shapes.NAME} has these)"
        )


def _shape(config: RunConfig) -> ResNetShape:
    return cast(ResNetShape, model_shape(config))


def _labelled(pixels: NDArray[np.float32], labels: NDArray[np.int64]) -> LabelledImages:
    import torch

    normal = (pixels - np.float32(MEAN)) / np.float32(DEVIATION)
    return LabelledImages(torch.from_numpy(normal), torch.from_numpy(labels))
