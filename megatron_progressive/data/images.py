"""Labelled images of a run: drawn as they are read (:mod:`.shapes`) or from a folder
(:mod:`.image_folder`). Nothing is prepared beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data import image_folder, shapes
from megatron_progressive.models import model_shape
from megatron_progressive.models.families.resnet import ResNetShape

if TYPE_CHECKING:
    import torch

MEAN, DEVIATION = 0.5, 0.25
"""What pixels, from 0 to 1, are normalised with."""


class LabelledImages(NamedTuple):
    """Some samples."""

    pixels: torch.Tensor
    """fp32 [n, 3, size, size], normalised."""
    labels: torch.Tensor
    """int64 [n]."""


class ImageData:
    """Batches of a run: a function of its seed and of sample numbers."""

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
        """Pictures of the validation split; None where they are drawn."""
        return self._source.validation_samples

    def train_batch(self, first_sample: int, count: int) -> LabelledImages:
        """Draws ``first_sample`` to ``first_sample + count`` of training."""
        return _labelled(*self._source.train(first_sample, count))

    def validation_batch(self, first: int, count: int) -> LabelledImages:
        """Samples ``first`` to ``first + count`` of validation, the same for every seed."""
        return _labelled(*self._source.validation(first, count))


def check(config: RunConfig) -> None:
    """Whether the images can be trained on.

    Raises:
        ConfigError: no such folder, or classes that the model or the training split lacks.
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
