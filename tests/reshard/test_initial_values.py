"""Initial values: a function of (seed, generation, name, element), Gaussian of the right size."""

from __future__ import annotations

import hashlib
import math
import random

import numpy as np
import pytest
import torch
from numpy.random import Philox
from scipy import stats
from scipy.special import ndtri

from megatron_progressive.models.base import TensorSpec
from megatron_progressive.reshard import initial_values as module
from megatron_progressive.reshard.boxes import MASTER, PARAM, Box, Piece, ShardedState, whole
from megatron_progressive.reshard.initial_values import initial_values
from megatron_progressive.runtime import environment

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


def plain_element(key: int, element: int, std: float) -> np.float32:
    """One element by the module's own words, without anything in common with its code."""
    word = int(Philox(key=key, counter=element // 4).random_raw(4)[element % 4])
    return np.float32(ndtri(((word >> 11) + 0.5) * 2.0**-53) * std)


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_every_element_is_that_of_plain_code(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    """Boxes of any shape, cut along any axes, whatever is drawn at once and by how many threads."""
    monkeypatch.setattr(module, "cores_of_this_rank", lambda: cores)
    monkeypatch.setattr(module, "_CHUNK", 64)
    monkeypatch.setattr(module, "_GAP", 8)
    chance = random.Random(cores)
    for case in range(150):
        shape = tuple(chance.randint(1, 40) for _ in range(chance.randint(1, 4)))
        offset = tuple(chance.randrange(n) for n in shape)
        extent = tuple(chance.randint(1, n - o) for n, o in zip(shape, offset, strict=True))
        live = chance.choice([None, chance.randint(0, shape[0])])
        box, std = Box(offset, extent), chance.random()
        spec = TensorSpec(shape, "fc1", "normal", std, live_rows=live)
        values = initial_values(case, cores, "name", spec, box).numpy()
        key = module.tensor_key(case, cores, "name")
        for _ in range(20):
            place = tuple(chance.randrange(n) for n in extent)
            there = tuple(o + p for o, p in zip(offset, place, strict=True))
            element = sum(i * math.prod(shape[a + 1 :]) for a, i in enumerate(there))
            dead = live is not None and there[0] >= live
            expected = np.float32(0) if dead else plain_element(key, element, std)
            assert values[place] == expected, (shape, box, place)


def test_bits_are_those_of_the_first_release() -> None:
    """A run's initial values, and what it grows, stay those that it began with."""
    digests = []
    for shape, box in (
        ((201, 63), Box((37, 5), (53, 4))),
        ((4096, 512), Box((3, 0), (1000, 512))),
        ((512, 2048), Box((0, 1024), (512, 1024))),
        ((7, 5, 3, 11), Box((1, 0, 1, 2), (5, 5, 2, 8))),
        ((100_003,), Box((17,), (99_000,))),
    ):
        spec = TensorSpec(shape, "fc1", "normal", 0.02)
        bits = initial_values(1234, 1, "decoder.x.weight", spec, box).numpy().tobytes()
        digests.append(hashlib.blake2b(bits, digest_size=8).hexdigest())
    assert digests == DIGESTS


DIGESTS = [
    "ca122a8745c69019",
    "9652c745e968e5be",
    "412d6f2ac4fac857",
    "053d9530b38cffb9",
    "f6fe0a729cf741d3",
]
"""Of the code of November 2026 that drew whole rows, one after the other."""


def test_what_several_slots_hold_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row-parallel weight in bf16 and shards of its master weights: no element is drawn twice,
    and none of the other ranks' columns."""
    drawn = []

    def counted(values: np.ndarray, **given: np.ndarray) -> np.ndarray:
        drawn.append(values.size)
        result: np.ndarray = ndtri(values, **given)
        return result

    monkeypatch.setattr(module, "ndtri", counted)
    spec = TensorSpec((64, 2048), "fc2", "normal", 0.5)
    weight, shards = Box((0, 512), (64, 512)), [Box((8, 512), (3, 512)), Box((11, 512), (1, 100))]
    pieces = [
        Piece("a", PARAM, spec.shape, weight, torch.empty(weight.shape, dtype=torch.bfloat16)),
        *(Piece("a", MASTER, spec.shape, box, torch.empty(box.shape)) for box in shards),
    ]
    module.initialise_all(ShardedState(pieces), {"a": spec}, 3)
    assert sum(drawn) == weight.numel
    full = initial_values(3, 0, "a", spec, whole(spec.shape))
    for piece in pieces:
        expected = full[piece.box.slices_within(whole(spec.shape))].to(piece.data.dtype)
        assert torch.equal(piece.data, expected)


def test_cores_are_divided_over_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 112)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(112)), raising=False)
    cores = environment.cores_of_this_rank
    assert cores({"LOCAL_WORLD_SIZE": "8"}) == 14
    assert cores({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NTASKS": "16"}) == 14
    assert cores({}) == 112
    assert cores({"LOCAL_WORLD_SIZE": "400"}) == 1
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(10)), raising=False)
    assert cores({"LOCAL_WORLD_SIZE": "8"}) == 10  # bound to them: they are this rank's
