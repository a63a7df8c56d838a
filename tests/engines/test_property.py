"""Expansions between random engines, layouts and depths equal the reference, bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.engines.base import GlobalBatch
from megatron_progressive.models import model_shape
from megatron_progressive.plan.preflight import check_run
from tests.engines import on_ranks, reference
from tests.pool import Pool

CASES, EACH = 300, 15
SAMPLES = 12  # a step: divides over 1 to 4 data-parallel ranks, and over stages


def random_parallel(rng: random.Random, world: int, experts: bool) -> dict[str, Any]:
    """Any engine, any layout that fits ``world`` ranks."""
    parallel = {"engine": "megatron", "tensor": 1, "pipeline": 1, "virtual_pipeline": 1,
                "context": 1, "uneven": True, "expert": 1, "expert_tensor": None,
                "zero_stage": rng.randint(0, 1),
                "recompute": rng.choice(["none", "none", "selective", "full"])}  # fmt: skip
    if parallel["recompute"] == "full":
        parallel["recompute_layers"] = rng.choice([None, 1])
    if rng.random() < (0.25 if experts else 0.45):
        return {
            **parallel,
            "engine": "deepspeed",
            "expert_tensor": 1 if experts else None,
            "zero_stage": rng.randint(0, 3),
        }
    parallel["context"] = rng.choice([c for c in (1, 1, 1, 1, 2, 2, 4) if world % c == 0])
    rest = world // parallel["context"]
    most = 2 if experts else 4  # leaves ranks for experts
    parallel["tensor"] = rng.choice([t for t in (1, 2, 4) if rest % t == 0 and t <= most])
    if not experts:
        parallel["sequence"] = rng.choice([None, False])
    rest //= parallel["tensor"]
    parallel["pipeline"] = rng.choice([p for p in (1, 2, 3, 4) if rest % p == 0])
    if parallel["pipeline"] > 1:
        parallel["virtual_pipeline"] = rng.choice([1, 2, 2])
    if experts:
        block = world // parallel["pipeline"]
        tensor = rng.choice([parallel["tensor"], parallel["tensor"], 1])
        parallel["expert_tensor"] = tensor
        several = [e for e in (2, 4) if block // tensor % e == 0 and rng.random() < 0.8]
        parallel["expert"] = rng.choice(several or [1])
    return parallel


def random_family(rng: random.Random) -> tuple[str, list[str]]:
    """A family and the parts of it that vary."""
    family = rng.choice(
        ["gpt2", "gpt2", "llama3", "qwen3", "mixtral", "deepseek_v3", "deepseek_v3"]
    )
    words = [f"model.tie_embeddings={rng.choice(['true', 'false'])}"]
    if family == "gpt2":
        words.append(f"model.linear_bias={rng.choice(['true', 'false'])}")
    if family == "mixtral":
        words.append(f"model.moe.aux_loss_coeff={rng.choice([0, 0.02])}")
    if family == "deepseek_v3":
        words += [
            f"model.moe.first_k_dense={rng.randint(0, 3)}",
            f"model.moe.shared_experts={rng.randint(0, 1)}",
            f"model.moe.bias_update_rate={rng.choice([0, 0.1])}",
            f"model.mla.q_lora_rank={rng.choice([0, 16])}",
            f"model.mtp_layers={rng.choice([0, 0, 1])}",
        ]
    return family, words


def largest_micro_batch(world: int, *phases: dict[str, Any]) -> int:
    """Few micro-batches are quick; an interleaved pipeline needs a multiple of its stages."""
    data = [world // (p["tensor"] * p["pipeline"] * p["context"]) for p in phases]
    return next(
        size
        for size in range(SAMPLES, 0, -1)
        if all(SAMPLES % (size * ranks * p["pipeline"]) == 0
               for ranks, p in zip(data, phases, strict=True))
    )  # fmt: skip


def random_case(seed: int, world: int) -> RunConfig:
    rng = random.Random(seed)
    source = rng.randint(0, 4)
    copying = ["copying", "copying_zeroL", "copying_zeroN"] if source else []
    family, parts = random_family(rng)
    experts = family in ("mixtral", "deepseek_v3")
    before, after = (random_parallel(rng, world, experts) for _ in range(2))
    if {"model.mtp_layers=1", "model.tie_embeddings=true"} <= set(parts):
        for parallel in (before, after):  # DeepSpeed's stage 3 cannot run this
            parallel["zero_stage"] = min(parallel["zero_stage"], 2)
    expansion = {
        "at": 2,
        # experts are many tensors: few of the deepest models have them, for the time it takes
        "to_layers": rng.randint(source + 1, 12 if not experts or rng.random() < 0.25 else 6),
        "init": rng.choice(["random", "zero", *copying]),
        "order": rng.choice(["stack", "inter", "last"]),
        "insert": rng.choice(["bottom", "top", "middle"]),
        "optimizer_state": rng.choice(["inherit", "copy", "reset"]),
        "parallel": after,
    }
    words = [
        f"model.num_layers={source}",
        *parts,
        "optim.ns_steps=1",  # the expansion is tested, not the optimizer
        f"optim.name={rng.choice(['adamw', 'muon_nsgd'])}",
        f"optim.embeddings={rng.choice(['muon', 'adamw'])}",
        f"train.precision={rng.choice(['fp32', 'bf16'])}",
        f"train.global_batch={SAMPLES}",
        f"train.micro_batch={largest_micro_batch(world, before, after)}",
        *(f"parallel.{key}={value}" for key, value in before.items() if value is not None),
    ]
    config = on_ranks.family_config(family, words, expansion)
    check_run(config, world)
    if source > 1 and rng.random() < 0.5:
        first = rng.randrange(source)
        block = [first, rng.randint(first + 1, source)]
        with contextlib.suppress(ConfigError):  # of random layers, or without one of a new kind
            config = on_ranks.family_config(family, words, {**expansion, "block": block})
            check_run(config, world)
            return config
        config = on_ranks.family_config(family, words, expansion)
    return config


def differences(configs: list[RunConfig]) -> list[list[str]] | None:
    """Of each case, what is not as the reference says (rank 0 compares)."""
    found = []
    for config in configs:
        engine = on_ranks.start(config)
        engine.train_step(GlobalBatch(on_ranks.tokens, 0, SAMPLES), 0.01)
        before = on_ranks.gather(engine.state())
        engine, _ = on_ranks._expand(engine, config)
        after = on_ranks.gather(engine.state())
        metrics = engine.train_step(GlobalBatch(on_ranks.tokens, SAMPLES, SAMPLES), 0.01)
        stepped = on_ranks.gather(engine.state())
        engine.close()
        found.append(_compare(config, before, after, stepped, metrics.loss))
    return found if dist.get_rank() == 0 else None


def _compare(
    config: RunConfig,
    before: on_ranks.Full,
    after: on_ranks.Full,
    stepped: on_ranks.Full,
    loss: float,
) -> list[str]:
    section, optim = config.expansion[0], config.optim
    expected = reference.expanded(
        before, model_shape(config, section.to_layers), model_shape(config).num_layers,
        section.init, section.order, section.insert, section.optimizer_state, config.run.seed,
        lambda name: optim.name == "adamw" or (
            optim.embeddings == "adamw"
            and ("embedding" in name or "output" in name or name == "head.weight")),
        section.block,
    )  # fmt: skip
    wrong = [f"{key} only on one side" for key in after.keys() ^ expected.keys()]
    wrong += [f"{key} differs" for key in after.keys() & expected.keys()
              if not torch.equal(after[key], expected[key])]  # fmt: skip
    if not 0 < loss < 20:
        wrong.append(f"loss {loss} in the next step")
    slot = "master" if config.train.precision == "bf16" else "param"
    # zero sub-layers pass no gradient on, except to the biases at their ends
    learns = section.init not in ("zero", "copying_zeroN", "copying_zeroL")
    wrong += [f"{key} was not updated" for key in after
              if key[1] == slot and learns and torch.equal(after[key], stepped[key])]  # fmt: skip
    return wrong


def world_of(seed: int) -> int:
    return (1, 2, 4, 3, 4, 2, 4)[seed // EACH % 7]  # most layouts are of 4


def test_cases_cover_what_they_are_meant_to() -> None:
    configs = [random_case(seed, world_of(seed)) for seed in range(CASES)]
    assert len(configs) >= 200
    phases = [(c.parallel, c.parallel_after(1)) for c in configs]
    assert {(a.engine, b.engine) for a, b in phases} == set(
        itertools.product(["megatron", "deepspeed"], repeat=2)
    )
    stages = [p.zero_stage for pair in phases for p in pair if p.engine == "deepspeed"]
    assert set(stages) == {0, 1, 2, 3}
    virtual = {(a.virtual_pipeline, b.virtual_pipeline) for a, b in phases}
    assert virtual == set(itertools.product([1, 2], repeat=2))
    contexts = {(a.context, b.context) for a, b in phases}
    assert contexts >= {(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)}
    divided = [p for pair in phases for p in pair if p.context > 1]
    assert {(p.tensor > 1, p.pipeline > 1) for p in divided} >= {(True, False), (False, True)}
    assert any(p.expert > 1 for p in divided)
    assert {c.model.family for c in configs} == set(on_ranks.SMALL_FAMILIES)
    experts = {(a.expert > 1, b.expert > 1) for a, b in phases}
    assert experts == set(itertools.product([True, False], repeat=2))
    assert any(b.expert > 1 and b.expert_tensor != b.tensor for _, b in phases)
    assert any(b.expert > 1 and b.expert_tensor == b.tensor == 2 for _, b in phases)
    assert {c.model.num_layers for c in configs} == set(range(5))
    assert {c.expansion[0].to_layers for c in configs} >= set(range(2, 13))
    grown = [(c.model.num_layers, c.expansion[0]) for c in configs]
    copied = [(depth, e) for depth, e in grown if e.init.startswith("copying")]
    placed = {(e.insert, e.order, e.block is None) for depth, e in copied if depth > 1}
    assert placed == set(
        itertools.product(["bottom", "top", "middle"], ["stack", "inter", "last"], [True, False])
    )
    assert any(e.insert == "middle" and depth > 1 for depth, e in grown if e.init == "random")


@pytest.mark.parametrize("first", range(0, CASES, EACH))
def test_random_expansions_equal_the_reference(pool: Pool, first: int) -> None:
    world = world_of(first)
    configs = [random_case(seed, world) for seed in range(first, first + EACH)]
    results = pool.run(world, differences, configs)[0]
    for seed, config, wrong in zip(range(first, first + EACH), configs, results, strict=True):
        assert not wrong, (seed, world, config.parallel, config.expansion, config.optim, wrong)
