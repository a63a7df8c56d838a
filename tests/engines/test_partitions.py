"""Predicted pieces of every rank against the state of real engines."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive.config import ParallelSection, RunConfig, from_dict
from megatron_progressive.engines.buffer_places import distributed_optimizer_places
from megatron_progressive.engines.partitions import (
    held_pieces,
    pieces_of_rank,
)
from megatron_progressive.models import model_shape
from megatron_progressive.optim.rules import STEP
from megatron_progressive.reshard.boxes import PieceMeta
from megatron_progressive.runtime.layout import Layout, make_layout
from tests.engines import on_ranks
from tests.pool import Pool

ROOT = Path(__file__).parents[2]


def predicted(config: RunConfig, world: int) -> list[Counter[PieceMeta]]:
    shape, layout = model_shape(config), make_layout(config.parallel, world)
    ranks: list[Counter[PieceMeta]] = [Counter() for _ in range(world)]
    for pieces, holders in held_pieces(shape, config.optim, config.train.precision, layout):
        for rank in holders:
            ranks[rank].update(pieces)
    return ranks


def random_case(rng: random.Random, world: int) -> RunConfig:
    """Sizes that are no multiples of 64, so that padding and partial rows matter."""
    tensor, pipeline = rng.choice(
        [(t, p) for t in (1, 2, 4) for p in (1, 2, 3, 4) if world % (t * p) == 0]
    )
    context = rng.choice([c for c in (1, 2, 4) if world % (tensor * pipeline * c) == 0])
    heads = 4
    virtual = rng.choice([1, 2, 3]) if pipeline > 1 else 1
    words = {
        "model.num_layers": rng.randint(0, 3 * pipeline),
        "model.num_attention_heads": heads,
        "model.hidden_size": heads * rng.choice([3, 5, 8, 16]),
        "model.ffn_hidden_size": 4 * rng.randint(1, 40),
        "model.tie_embeddings": rng.choice(["true", "false"]),
        "model.linear_bias": rng.choice(["true", "false"]),
        "data.vocab_size": rng.randint(100, 600),
        "data.sequence_length": 2 * context * rng.randint(2, 9),
        "train.precision": rng.choice(["fp32", "bf16"]),
        "optim.name": rng.choice(["adamw", "adamw", "muon_nsgd", "muon_nsgd"]),
        "optim.embeddings": rng.choice(["muon", "adamw"]),
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "parallel.virtual_pipeline": virtual,
        "parallel.context": context,
        "parallel.uneven": "true",
        "parallel.zero_stage": rng.choice([0, 1, 1, 1]),
    }
    return from_dict({"model": {"family": "gpt2"}}, [f"{k}={v}" for k, v in words.items()])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_prediction_equals_what_real_megatron_engines_hold(pool: Pool, world: int) -> None:
    rng = random.Random(world)
    configs = [random_case(rng, world) for _ in range(4 if world == 1 else 9)]
    check(pool, world, configs)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_prediction_equals_what_real_deepspeed_engines_hold(pool: Pool, world: int) -> None:
    """Every stage and precision, at odd sizes, so that no share ends without padding."""
    rng = random.Random(world)
    configs = []
    for stage, precision in product(range(4), ("fp32", "bf16")):
        words = {
            "model.num_layers": rng.randint(0, 2),
            "model.num_attention_heads": 1,
            "model.hidden_size": rng.choice([5, 7, 13]),
            "model.ffn_hidden_size": rng.randint(3, 30),
            "model.tie_embeddings": rng.choice(["true", "false"]),
            "data.vocab_size": 100,
            "data.sequence_length": rng.choice([3, 17, 32]),
            "train.precision": precision,
            "optim.name": rng.choice(["adamw", "muon_nsgd"]),
            "optim.embeddings": rng.choice(["muon", "adamw"]),
            "parallel.engine": "deepspeed",
            "parallel.zero_stage": stage,
        }
        configs.append(
            from_dict({"model": {"family": "gpt2"}}, [f"{k}={v}" for k, v in words.items()])
        )
    check(pool, world, configs)


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_prediction_for_families_under_deepspeed(pool: Pool, family: str) -> None:
    rng = random.Random(family)
    configs = []
    for stage in range(4):
        config = random_family_case(rng, family, 1)
        parallel = replace(config.parallel, engine="deepspeed", zero_stage=stage)
        configs.append(replace(config, parallel=parallel))
    check(pool, 2, configs)


SIZES: dict[str, Any] = {
    "gpt2": {},
    "llama3": {"num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 44},
    "qwen3": {"num_attention_heads": 4, "num_query_groups": 4, "head_dim": 6,
              "ffn_hidden_size": 20},
    "mixtral": {"num_attention_heads": 8, "num_query_groups": 4,
                "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 12}},
    "deepseek_v3": {
        "num_attention_heads": 4, "ffn_hidden_size": 36,
        "mla": {"q_lora_rank": 20, "kv_lora_rank": 14, "qk_nope_head_dim": 6,
                "qk_rope_head_dim": 2, "v_head_dim": 5},
        "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 20, "num_groups": 1,
                "top_k_groups": 1},
    },
}  # fmt: skip


def random_family_case(
    rng: random.Random, family: str, world: int, separate: bool = False
) -> RunConfig:
    """A model of any family, at odd sizes, in any layout that cuts it: experts too, which have
    parallel groups of their own with ``separate``."""
    moe = "moe" in SIZES[family]
    layouts = [
        (t, p, e, x)
        for t in (1, 2, 4) for p in (1, 2, 4) for e in ((1, 2, 4) if moe else (1,))
        for x in ((1, 2, 4) if moe else (t,))
        if world % (t * p) == 0 and world % (x * e * p) == 0
    ]  # fmt: skip
    if separate:
        layouts = [(t, p, e, x) for t, p, e, x in layouts if e > 1 or x != t]
    tensor, pipeline, expert, expert_tensor = rng.choice(layouts)
    virtual = rng.choice([1, 2]) if pipeline > 1 else 1
    words = {
        "model.num_layers": rng.randint(2 if separate else 0, 2 * pipeline * virtual),
        "model.hidden_size": 16 * rng.randint(1, 4),
        "model.tie_embeddings": rng.choice(["true", "false"]),
        "data.vocab_size": rng.randint(100, 600),
        "data.sequence_length": 4 * rng.randint(1, 9),
        "train.precision": rng.choice(["fp32", "bf16"]),
        "optim.name": rng.choice(["adamw", "muon_nsgd"]),
        "optim.embeddings": rng.choice(["muon", "adamw"]),
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "parallel.virtual_pipeline": virtual,
        "parallel.uneven": "true",
        "parallel.expert": expert,
        "parallel.expert_tensor": expert_tensor,
        "parallel.zero_stage": rng.choice([0, 1, 1, 1]),
    }
    if family == "deepseek_v3":
        words |= {
            "model.mtp_layers": rng.randint(0, 2),
            "model.moe.first_k_dense": rng.randint(0, 1 if separate else 2),
            "model.moe.shared_experts": rng.randint(0, 1),
            "model.moe.bias_update_rate": rng.choice([0, 0.001]),
        }
    return from_dict(
        {"model": {"family": family, **SIZES[family]}}, [f"{k}={v}" for k, v in words.items()]
    )


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama3", "qwen3", "mixtral", "deepseek_v3"])
def test_prediction_for_every_family_and_for_experts(pool: Pool, family: str, world: int) -> None:
    rng = random.Random(f"{family} {world}")
    moe = "moe" in SIZES[family]
    configs = [random_family_case(rng, family, world) for _ in range(3)]
    if moe and world > 1:
        configs += [random_family_case(rng, family, world, separate=True) for _ in range(5)]
        # neighbours have other experts, ranks further apart the same
        parallel = ParallelSection(expert=2, expert_tensor=1)
        configs.append(replace(configs[-1], parallel=parallel))
    check(pool, world, configs)


def check(pool: Pool, world: int, configs: list[RunConfig]) -> None:
    held = pool.run(world, on_ranks.held_pieces_of, configs)
    for index, config in enumerate(configs):
        expected = predicted(config, world)
        shape, layout = model_shape(config), make_layout(config.parallel, world)
        for rank in range(world):
            assert Counter(held[rank][index]) == expected[rank], (config, rank)
            alone = pieces_of_rank(shape, config.optim, config.train.precision, layout, rank)
            assert Counter(alone) == expected[rank]


def test_prediction_modules_behind_stages_without_layers(pool: Pool) -> None:
    """The final norm stays with the last layer then; a tied model has two copies of the
    embedding."""
    words = ["model.num_layers=1", "model.mtp_layers=2", "parallel.pipeline=4"]
    configs = [
        on_ranks.family_config("deepseek_v3", [*words, f"model.tie_embeddings={tie}", *more])
        for tie in (True, False)
        for more in (["optim.name=adamw"], ["train.precision=bf16", "optim.embeddings=adamw"])
    ]
    check(pool, 4, configs)


@pytest.mark.parametrize("data_ranks", [1, 3, 128, 4096])
def test_shares_of_a_buffer_cover_every_tensor_once(data_ranks: int) -> None:
    rng = random.Random(data_ranks)
    numels = [rng.randint(1, 5_000_000) for _ in range(20)]
    alone = [index in (0, 11) for index in range(20)]
    for numel, place in zip(
        numels, distributed_optimizer_places(numels, alone, data_ranks), strict=True
    ):
        ranges = [place.owned(rank) for rank in place.ranks()]
        assert (ranges[0][0], ranges[-1][1]) == (0, numel)
        assert all(a[1] == b[0] and a[0] < a[1] for a, b in pairwise([*ranges, (numel, numel)]))


def test_thousands_of_ranks_in_seconds() -> None:
    """7B, AdamW: DP=4096, and TP=8 x PP=4 x DP=128; each element has one owner."""
    config = from_dict({"model": {"family": "gpt2", "preset": "7b"}, "optim": {"name": "adamw"}})
    shape = model_shape(config)
    for layout in (Layout(4096), Layout(4096, tensor=8, pipeline=4)):
        started = time.perf_counter()
        elements: Counter[str] = Counter()
        ranks_seen: set[int] = set()
        for pieces, ranks in held_pieces(shape, config.optim, "bf16", layout):
            for piece in pieces:
                if piece.key[0].endswith("linear_fc2.weight"):
                    elements[piece.key[1]] += piece.box.numel
            ranks_seen.update(ranks)
        assert time.perf_counter() - started < 30  # 2 s on an idle core
        del elements[STEP]
        assert set(elements.values()) == {60 * 4 * 3072 * 3072}
        assert ranks_seen == set(range(4096))
        started = time.perf_counter()
        assert pieces_of_rank(shape, config.optim, "bf16", layout, 4095)
        assert time.perf_counter() - started < 5  # 0.1 s on an idle core


def test_needs_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, megatron_progressive.engines.partitions\n"
        "print([m for m in ('torch', 'megatron', 'deepspeed') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
