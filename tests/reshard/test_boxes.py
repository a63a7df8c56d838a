"""Boxes against plain indexing of whole tensors."""

from __future__ import annotations

import random

import torch

from megatron_progressive.reshard.boxes import Box, flat_range_boxes, whole


def random_box(rng: random.Random) -> Box:
    axes = rng.randint(1, 3)
    return Box(
        tuple(rng.randint(0, 3) for _ in range(axes)), tuple(rng.randint(1, 5) for _ in range(axes))
    )


def test_flat_ranges_are_the_same_elements_in_few_boxes() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        outer = random_box(rng)
        start = rng.randint(0, outer.numel)
        end = rng.randint(start, outer.numel)
        flat = torch.arange(outer.numel)
        full = flat.view(outer.shape)
        parts = flat_range_boxes(outer, start, end)
        assert len(parts) <= 2 * len(outer.shape) - 1
        reached = start
        for box, low, high in parts:
            assert low == reached
            assert torch.equal(full[box.slices_within(outer)].reshape(-1), flat[low:high])
            reached = high
        assert reached == end or start == end


def test_intersection_and_split_cover_each_element_once() -> None:
    rng = random.Random(2)
    for _ in range(500):
        outer = random_box(rng)
        counts = torch.zeros(outer.shape)
        for part in outer.split(rng.randint(1, 7)):
            counts[part.slices_within(outer)] += 1
        assert torch.equal(counts, torch.ones(outer.shape))
        other = Box(tuple(rng.randint(0, 4) for _ in outer.shape), outer.shape)
        common = outer.intersect(other)
        full = whole([12] * len(outer.shape))
        marks = torch.zeros(full.shape)
        marks[outer.slices_within(full)] += 1
        marks[other.slices_within(full)] += 1
        assert int((marks == 2).sum()) == (common.numel if common else 0)
