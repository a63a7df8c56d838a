"""Muon-NSGD with one owner of each matrix, on real gloo ranks: what it computes, sends, holds."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from megatron_progressive.config import RunConfig, from_dict
from megatron_progressive.engines.partitions import chunk_tensors
from megatron_progressive.models import model_shape, tensor_table
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.optim.coefficients import SETS
from megatron_progressive.optim.owners import (
    MOST_PADDING,
    BufferTensor,
    bucket_numel,
    owner_places,
)
from megatron_progressive.optim.rules import ADAMW, MUON, NSGD, rule_of
from megatron_progressive.runtime.layout import Layout
from tests.engines import on_ranks, owners_on_ranks
from tests.pool import Pool


def words(parallel: dict[str, Any]) -> list[str]:
    return [f"parallel.{key}={value}" for key, value in parallel.items()]


LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("gpt2", 2, {}),
    ("gpt2", 4, {}),
    ("gpt2", 2, {"tensor": 2}),
    ("gpt2", 2, {"pipeline": 2}),
    ("gpt2", 4, {"tensor": 2}),
    ("deepseek_v3", 2, {"expert": 2}),
    ("deepseek_v3", 4, {"expert": 2, "tensor": 2}),
    ("mixtral", 4, {"expert": 2}),
]


@pytest.mark.parametrize("layers", [0, 1, 4])
def test_ten_steps_equal_those_of_one_process(pool: Pool, layers: int) -> None:
    expected: dict[str, Any] = {}
    for family, world, parallel in LAYOUTS:
        base = [f"model.num_layers={layers}", "train.micro_batch=1"]
        if family not in expected:
            config = on_ranks.family_config(family, base)
            expected[family] = pool.run(1, owners_on_ranks.weights_after, config, 10)[0]
        config = on_ranks.family_config(family, [*base, *words(parallel)])
        found = pool.run(world, owners_on_ranks.weights_after, config, 10)[0]
        assert set(found) == set(expected[family])
        for name, weight in expected[family].items():
            difference = np.linalg.norm(found[name] - weight)
            assert difference <= 1e-5 * np.linalg.norm(weight), (family, world, parallel, name)


# Newton-Schulz enlarges the rounding of a gradient's smallest directions some hundred times
LR = 0.002


@pytest.mark.parametrize(
    ("family", "world", "parallel"),
    [
        ("gpt2", 4, {"tensor": 2}),
        ("llama3", 4, {"tensor": 2}),
        ("mixtral", 4, {"expert": 2, "tensor": 2}),
    ],
)
def test_one_step_equals_torchs_muon_and_the_formula_of_nsgd(
    pool: Pool,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    world: int,
    parallel: dict[str, Any],
) -> None:
    """After one step momentum is (1 - 0.95) of the gradient that it took."""
    # torch orthogonalises in bf16; with its cast to bf16 taken away it is fp32
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)
    bias = ["model.linear_bias=true"] if family == "gpt2" else []  # vectors that are cut
    config = on_ranks.family_config(family, ["model.num_layers=2", *bias, *words(parallel)])
    before, after = pool.run(world, owners_on_ranks.one_step, config, LR)[0]
    rules = set()
    for name, spec in tensor_table(model_shape(config)).items():
        weight = torch.from_numpy(before[name, "param"])
        gradient = torch.from_numpy(after[name, "momentum"]) / 0.05
        found = torch.from_numpy(after[name, "param"])
        rule = rule_of(spec, config.optim)
        rules.add(rule)
        if rule == MUON:
            grads, found_parts = separate(gradient, spec), separate(found, spec)
            for old, grad, new in zip(separate(weight, spec), grads, found_parts, strict=True):
                assert_close(torchs_muon(old, grad), new, name)
        else:
            update = gradient / gradient.norm() * math.sqrt(gradient.numel())
            assert_close(weight - LR * update, found, name)
    assert rules == {MUON, NSGD}


def separate(tensor: torch.Tensor, spec: TensorSpec) -> list[torch.Tensor]:
    if not spec.row_blocks:
        return list(tensor.reshape(-1, *tensor.shape[-2:]))
    groups = tensor.reshape(-1, sum(spec.row_blocks), tensor.shape[-1]).split(spec.row_blocks, 1)
    return [rows.reshape(-1, tensor.shape[-1]) for rows in groups]


def torchs_muon(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    # torch's "original" scales by sqrt(max(1, out / in)), ours by sqrt(out / in)
    ratio = min(1.0, math.sqrt(weight.shape[0] / weight.shape[1]))
    torch.optim.Muon(
        [parameter], lr=LR * ratio, weight_decay=0.01 / ratio, momentum=0.95, nesterov=True,
        ns_coefficients=SETS["jordan"].values[0], ns_steps=5, adjust_lr_fn="original",
    ).step()  # fmt: skip
    return parameter.detach()


def assert_close(expected: torch.Tensor, found: torch.Tensor, name: str) -> None:
    assert (expected - found).norm() <= 1e-6 * expected.norm(), name


def matrices(config: RunConfig, layers: int | None = None) -> int:
    """Matrices of a model that Muon updates."""
    specs = tensor_table(model_shape(config, layers)).values()
    return sum(
        math.prod(spec.shape[:-2]) * max(1, len(spec.row_blocks))
        for spec in specs
        if spec.trainable and rule_of(spec, config.optim) == MUON
    )


MEGATRON: dict[str, Any] = {"engine": "megatron", "zero_stage": 1, "pipeline": 1}
DEEPSPEED: list[dict[str, Any]] = [{"engine": "deepspeed", "zero_stage": s} for s in (1, 2, 3)]
COUNTED: list[tuple[str, int, int, dict[str, Any], dict[str, Any]]] = [
    ("gpt2", 2, 1, {"pipeline": 2}, MEGATRON),
    ("gpt2", 4, 2, MEGATRON, {"tensor": 2, "pipeline": 2}),
    ("llama3", 4, 1, {"tensor": 2}, {"tensor": 4}),
    ("gpt2", 2, 1, DEEPSPEED[0], DEEPSPEED[2]),
    ("llama3", 2, 2, DEEPSPEED[1], MEGATRON),
    ("mixtral", 4, 2, {}, {"expert": 2, "tensor": 2}),
    ("deepseek_v3", 4, 1, {"expert": 2, "tensor": 2}, {"pipeline": 2, "tensor": 1, "expert": 2}),
    ("deepseek_v3", 4, 2, {"tensor": 2, "expert": 2, "expert_tensor": 1}, {"tensor": 4}),
]


@pytest.mark.parametrize(("family", "world", "micro_batch", "before", "after"), COUNTED)
def test_each_matrix_is_orthogonalised_once_a_step(
    pool: Pool,
    family: str,
    world: int,
    micro_batch: int,
    before: dict[str, Any],
    after: dict[str, Any],
) -> None:
    """Over the whole job, whatever the micro-batches, and right after an expansion too."""
    expansion = {"at": 2, "to_layers": 3, "init": "random", "parallel": after}
    config = on_ranks.family_config(
        family,
        ["model.num_layers=1", f"train.micro_batch={micro_batch}", "parallel.uneven=true",
         "model.tie_embeddings=true", *words(before)],
        expansion,
    )  # fmt: skip
    ranks = pool.run(world, owners_on_ranks.matrices_of_steps, config, 2)
    found = [sum(step) for step in zip(*ranks, strict=True)]
    assert found == [matrices(config)] * 2 + [matrices(config, 3)] * 2, ranks


# the proportions of GPT-2 124M: embedding to layers 0.45 to 1
PROPORTIONS = {
    "model": {"family": "gpt2", "hidden_size": 64, "num_attention_heads": 4, "num_layers": 12},
    "data": {"vocab_size": 4090, "sequence_length": 16},
    "train": {"global_batch": 8, "micro_batch": 2, "steps": 20},
}


def traffic(pool: Pool, world: int, words: list[str]) -> tuple[list[int], list[int], Any]:
    config = from_dict(PROPORTIONS, words)
    results = pool.run(world, owners_on_ranks.traffic_and_state, config)
    return [sum(sent.values()) for sent, _ in results], [held for _, held in results], results


@pytest.mark.parametrize(
    ("world", "more"),
    [(2, []), (4, []), (4, ["parallel.tensor=2"]), (2, ["optim.embeddings=adamw"]),
     (4, ["parallel.pipeline=2"])],
)  # fmt: skip
def test_traffic_and_state_are_those_of_zero_stage_1(
    pool: Pool, world: int, more: list[str]
) -> None:
    more = [*more, "train.precision=bf16"]
    adamw, _, _ = traffic(pool, world, [*more, "optim.name=adamw"])
    muon, held, results = traffic(pool, world, more)
    print(world, more, [m / a for m, a in zip(muon, adamw, strict=True)], results)
    assert sum(adamw) > 0
    assert max(m / a for m, a in zip(muon, adamw, strict=True)) < 1.05 + 1e-3
    _, replicated, _ = traffic(pool, world, [*more, "parallel.zero_stage=0"])
    data = world // (2 if "parallel.tensor=2" in more or "parallel.pipeline=2" in more else 1)
    assert max(held) <= 1.15 * max(replicated) / data


PRESETS = [("gpt2", "124m"), ("llama3", "1b"), ("deepseek_v3", "0.2b"), ("deepseek_v3", "0.5b")]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("family", "preset"), PRESETS)
def test_presets_have_little_padding_and_few_cuts(family: str, preset: str, ranks: int) -> None:
    config = from_dict({"model": {"family": family, "preset": preset}})
    tensors = [
        BufferTensor(t.name, t.spec.numel, rule_of(t.spec, config.optim))
        for t in chunk_tensors(model_shape(config), Layout(1))[0][0]
        if t.spec.trainable
    ]
    places = owner_places(tensors, ranks)
    total = sum(place.numel for place in places)
    assert {place.bucket for place in places} == {0}
    assert places[0].share * ranks <= (1 + MOST_PADDING) * total + 128 * ranks
    cut = [place for place in places if len(place.ranks()) > 1]
    # only what is larger than a share
    assert all(place.numel > total / ranks for place in cut)
    assert len(cut) <= 1


@pytest.mark.parametrize("ranks", [1, 3, 64, 1000])
def test_places_hold_every_tensor_once_in_any_order(ranks: int) -> None:
    rng = random.Random(ranks)
    for _ in range(20):
        tensors = [
            BufferTensor(
                f"t{i}", rng.choice([rng.randint(1, 99), rng.randint(1, 500_000)]),
                rng.choice([MUON, MUON, MUON, ADAMW]), rng.random() < 0.05,
            )
            for i in range(rng.randint(1, 30))
        ]  # fmt: skip
        places = owner_places(tensors, ranks)
        by_bucket: dict[int, list[Any]] = {}
        for place in places:
            by_bucket.setdefault(place.bucket, []).append(place)
        assert sorted(by_bucket) == list(range(len(by_bucket)))
        for members in by_bucket.values():
            members.sort(key=lambda place: place.start)
            assert all(a.start + a.numel <= b.start for a, b in pairwise(members))
            assert members[-1].start + members[-1].numel <= members[0].share * ranks
            assert {m.share for m in members} == {members[0].share}
        muon = [t for t in tensors if not t.alone and t.rule == MUON]
        if len(muon) == len(tensors):  # one bucket: the order of registration does not matter
            shuffled = rng.sample(range(len(tensors)), len(tensors))
            again = owner_places([tensors[i] for i in shuffled], ranks)
            assert again == [places[i] for i in shuffled]


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_buckets_hold_every_tensor_once_and_cut_no_more(ranks: int) -> None:
    """Consecutive tensors in reverse order, as Megatron-core takes them; whole ones stay whole."""
    rng, most = random.Random(ranks), 0
    for case in range(40):
        sizes = rng.choices([300, 5_000, 20_000, 90_000], k=rng.randint(1, 60))
        rules = rng.choice([[MUON], [ADAMW], [MUON, MUON, ADAMW]])
        tensors = [
            BufferTensor(
                f"t{i}", rng.randint(size // 2, size), rng.choice(rules), rng.random() < 0.03
            )
            for i, size in enumerate(sizes)
        ]  # fmt: skip
        bucket = rng.choice([50_000, 400_000])
        places, one = owner_places(tensors, ranks, bucket), owner_places(tensors, ranks)
        numbers = [place.bucket for place in reversed(places)]
        assert numbers == sorted(numbers)
        assert set(numbers) == set(range(max(numbers) + 1))
        for number in set(numbers):
            members = sorted((p for p in places if p.bucket == number), key=lambda p: p.start)
            assert all(a.start + a.numel <= b.start for a, b in pairwise(members))
            assert members[-1].start + members[-1].numel <= members[0].share * ranks
            assert {m.share for m in members} == {members[0].share}
        cut = [
            sum(p.numel for p, t in zip(found, tensors, strict=True)
                if t.rule == MUON and not t.alone and len(p.ranks()) > 1)
            for found in (places, one)
        ]  # fmt: skip
        assert cut[0] <= cut[1], case
        most = max(most, len(set(numbers)) - len({place.bucket for place in one}))
    assert most > 1


@pytest.mark.parametrize(("family", "preset"), PRESETS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon_nsgd"])
def test_presets_on_eight_ranks_have_several_buckets(
    family: str, preset: str, optimizer: str
) -> None:
    """So that reduce-scatters start during the backward pass."""
    config = from_dict(
        {"model": {"family": family, "preset": preset}, "optim": {"name": optimizer}}
    )
    tensors = [
        BufferTensor(t.name, t.spec.numel, rule_of(t.spec, config.optim))
        for t in chunk_tensors(model_shape(config), Layout(1))[0][0]
        if t.spec.trainable
    ]
    places = owner_places(tensors, 8, bucket_numel(8))
    shares = {place.bucket: place.share for place in places}
    assert len(shares) > 1
    if optimizer == "muon_nsgd":
        total = sum(place.numel for place in places)
        cut = [place.numel for place in places if len(place.ranks()) > 1]
        one = [place.numel for place in owner_places(tensors, 8) if len(place.ranks()) > 1]
        assert sum(cut) <= sum(one)
        assert sum(shares.values()) * 8 <= (1 + MOST_PADDING) * total + 128 * 8 * len(shares)
