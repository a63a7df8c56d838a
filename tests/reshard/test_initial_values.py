"""Initial values: a function of (seed, generation, name, element), Gaussian of the right size."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from megatron_progressive.models.base import TensorSpec
from megatron_progressive.reshard.boxes import Box, whole
from megatron_progressive.reshard.initial_values import initial_values

SPEC = TensorSpec((201, 63), "fc1", "normal", 0.5)  # odd rows: they start inside a counter


def test_any_box_has_the_bits_of_the_whole() -> None:
    full = initial_values(1, 0, "a", SPEC, whole(SPEC.shape))
    for box in (Box((37, 5), (53, 4)), Box((0, 60), (201, 3)), Box((200, 0), (1, 63))):
        part = initial_values(1, 0, "a", SPEC, box)
        assert torch.equal(part, full[box.slices_within(whole(SPEC.shape))])


def test_values_depend_on_seed_generation_and_name() -> None:
    box = whole(SPEC.shape)
    draws = [
        initial_values(*key, SPEC, box)
        for key in ((1, 0, "a"), (2, 0, "a"), (1, 1, "a"), (1, 0, "b"))
    ]
    correlations = np.corrcoef(torch.stack(draws).flatten(1).numpy())
    assert np.abs(correlations - np.eye(4)).max() < 0.05


def test_values_are_gaussian_of_the_given_deviation() -> None:
    values = initial_values(1, 0, "a", SPEC, whole(SPEC.shape)).numpy().ravel() / SPEC.std
    assert stats.kstest(values, "norm").pvalue > 0.01
    assert abs(values.std() - 1) < 0.02
