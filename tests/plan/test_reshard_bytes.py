"""Planned bytes of an expansion against masks of whole tensors, and against real expansions."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.engines.partitions import pieces_of_rank
from megatron_progressive.expansion.depth_map import COPY, depth_map
from megatron_progressive.models import model_shape, tensor_table
from megatron_progressive.plan.plan import make_plan
from megatron_progressive.plan.plan_text import render
from megatron_progressive.plan.reshard_bytes import NORMALS_PER_SECOND, reshard_bytes
from megatron_progressive.reshard.boxes import Box, Key, PieceMeta
from megatron_progressive.runtime.layout import make_layout
from tests.engines import on_ranks
from tests.engines.test_property import random_case
from tests.pool import Pool


def index_of(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))


def by_masks(config: RunConfig, world: int) -> tuple[list[int], list[int], list[int]]:
    """Bytes that each rank misses, those that only it can send, and those that it could send."""
    target_shape = model_shape(config, config.expansion[0].to_layers)
    table = tensor_table(target_shape)

    def pieces(phase: int, rank: int) -> list[PieceMeta]:
        shape = target_shape if phase else model_shape(config)
        layout = make_layout(config.parallel_after(phase), world)
        return pieces_of_rank(shape, config.optim, config.train.precision, layout, rank)

    shapes = {
        name: spec.shape for name, spec in (tensor_table(model_shape(config)) | table).items()
    }
    held: list[dict[Key, np.ndarray]] = []
    holders: dict[Key, np.ndarray] = {}
    for rank in range(world):
        mine: dict[Key, np.ndarray] = {}
        for piece in pieces(0, rank):
            if piece.readable:
                shape = (1,) if piece.key[1] == "step" else shapes[piece.key[0]]
                mine.setdefault(piece.key, np.zeros(shape, bool))[index_of(piece.box)] = True
        for key, mask in mine.items():
            holders[key] = holders.get(key, np.zeros(mask.shape, int)) + mask
        held.append(mine)
    expansion = config.expansion[0]
    rules = depth_map(
        model_shape(config), target_shape, expansion.init,
        expansion.order, expansion.insert, expansion.optimizer_state, expansion.block,
    )  # fmt: skip
    missed, only, could = [0] * world, [0] * world, [0] * world
    for rank in range(world):
        wants: dict[Key, np.ndarray] = {}  # of the source: copies of one layer need it once
        sizes: dict[Key, int] = {}
        for piece in pieces(1, rank):
            rule = rules[piece.key[0]]
            action = rule.weights if piece.key[1] in ("param", "master") else rule.state
            if action != COPY:
                continue
            assert rule.source is not None
            key = (rule.source, piece.key[1])
            wants.setdefault(key, np.zeros(holders[key].shape, bool))[index_of(piece.box)] = True
            sizes[key] = 2 if piece.dtype == "bfloat16" else 4
        for key, want in wants.items():
            nothing, size = np.zeros(want.shape, bool), sizes[key]
            want &= ~held[rank].get(key, nothing)
            missed[rank] += size * int(want.sum())
            for other in range(world):
                has = want & held[other].get(key, nothing)
                could[other] += size * int(has.sum())
                only[other] += size * int((has & (holders[key] == 1)).sum())
    return missed, only, could


@pytest.mark.parametrize("seed", range(24))
def test_bytes_equal_those_of_masks_of_whole_tensors(seed: int) -> None:
    world = 1 + seed % 4
    config = random_case(seed, world)
    planned = reshard_bytes(config, 0, world)
    missed, only, could = by_masks(config, world)
    assert planned.received.tolist() == missed
    assert planned.total == sum(missed) == planned.sent.sum()
    for sent, least, most in zip(planned.sent.tolist(), only, could, strict=True):
        assert least <= sent <= most


@pytest.mark.parametrize("seed", range(8))
def test_bytes_from_sharded_weights(seed: int) -> None:
    """From DeepSpeed's ZeRO stage 3, whose weights are shards, and from stage 2."""
    rng = random.Random(seed)
    after = {"engine": "megatron", "zero_stage": 1, "tensor": rng.choice([1, 2])}
    expansion = {"at": 2, "to_layers": 4, "init": "copying", "parallel": after}
    words = [f"optim.name={rng.choice(['adamw', 'muon_nsgd'])}", "model.num_layers=1"]
    words += ["parallel.engine=deepspeed", f"parallel.zero_stage={rng.choice([2, 3])}"]
    config = on_ranks.small_config(words, expansion)
    world = 2 * rng.randint(1, 3)
    planned = reshard_bytes(config, 0, world)
    missed, only, could = by_masks(config, world)
    assert planned.received.tolist() == missed
    assert planned.total == planned.sent.sum()
    for sent, least, most in zip(planned.sent.tolist(), only, could, strict=True):
        assert least <= sent <= most


def test_random_cases_move_something() -> None:
    moved: dict[str, int] = defaultdict(int)
    for seed in range(24):
        config = random_case(seed, 1 + seed % 4)
        moved[config.optim.name] += reshard_bytes(config, 0, 1 + seed % 4).total
    assert set(moved) == {"adamw", "muon_nsgd"}
    assert all(moved.values())


@pytest.mark.parametrize(
    ("world", "words", "after"),
    [
        (4, ["optim.name=adamw", "train.precision=bf16"], {"tensor": 2, "pipeline": 2}),
        (4, ["optim.name=muon_nsgd", "parallel.pipeline=2"], {"tensor": 4, "pipeline": 1}),
    ],
)
def test_a_real_expansion_moves_the_planned_bytes(
    pool: Pool, world: int, words: list[str], after: dict[str, int]
) -> None:
    expansion = {"at": 2, "to_layers": 4, "init": "copying", "parallel": after}
    config = on_ranks.small_config(["model.num_layers=2", "train.micro_batch=1", *words], expansion)
    event = pool.run(world, on_ranks.expand_and_gather, config)[0][2]
    assert event.bytes_moved == reshard_bytes(config, 0, world).total > 0


@pytest.mark.parametrize(
    ("family", "words", "after"),
    [
        ("mixtral", ["optim.name=adamw", "train.precision=bf16"], {"expert": 2, "pipeline": 2}),
        ("deepseek_v3", ["parallel.expert=4", "model.mtp_layers=1"], {"expert": 2}),
    ],
)
def test_a_real_expansion_of_experts_moves_the_planned_bytes(
    pool: Pool, family: str, words: list[str], after: dict[str, int]
) -> None:
    expansion = {"at": 2, "to_layers": 4, "init": "copying", "parallel": after}
    words = ["model.num_layers=2", "train.micro_batch=1", *words]
    config = on_ranks.family_config(family, words, expansion)
    event = pool.run(4, on_ranks.expand_and_gather, config)[0][2]
    assert event.bytes_moved == reshard_bytes(config, 0, 4).total > 0


@pytest.mark.parametrize(
    ("family", "words", "after"),
    [
        ("gpt2", ["train.precision=bf16", "optim.name=adamw"], {"tensor": 2, "pipeline": 2}),
        ("deepseek_v3", ["parallel.tensor=2"], {"tensor": 1, "expert": 2, "pipeline": 2}),
        ("llama3", ["train.precision=bf16"], {"engine": "deepspeed", "zero_stage": 3}),
        ("llama3", ["train.precision=bf16"], {"engine": "deepspeed", "zero_stage": 1}),
    ],
)
def test_a_real_expansion_draws_the_planned_values(
    pool: Pool, family: str, words: list[str], after: dict[str, int]
) -> None:
    """Each rank those that it keeps, once: not for the weight and the master weight each, and not
    the columns of other ranks."""
    expansion = {"at": 2, "to_layers": 4, "init": "random", "parallel": after}
    words = ["model.num_layers=1", "train.micro_batch=1", *words]
    config = on_ranks.family_config(family, words, expansion)
    drawn = pool.run(4, on_ranks.drawn_in_expansion, config)
    assert drawn == reshard_bytes(config, 0, 4).drawn.tolist()
    assert min(drawn) > 0


def test_plan_says_bytes_and_time() -> None:
    expansion = {"at": 2, "to_layers": 4, "parallel": {"tensor": 2}}
    config = on_ranks.small_config(["optim.name=adamw", "model.num_layers=1"], expansion)
    plan = make_plan(config, 2, link_gb_per_s=0.001)
    moved = plan.expansions[0].reshard
    busiest = max(*moved.received.tolist(), *moved.sent.tolist())
    assert moved.seconds(0.001) == pytest.approx(busiest / 1e6)
    text = " ".join(render(plan).split())
    assert f"{busiest / 1e6:.3g} s" in text
    assert f"{moved.total / 1e3:.3g} kB" in text
    assert "0.001 GB/s" in text
    drawn = int(moved.drawn.max())
    assert drawn > 0
    assert f"{drawn / NORMALS_PER_SECOND:.3g} s on 1 core" in text
    with pytest.raises(ConfigError, match=r"--link-gb-per-s: got 0; accepted: a number above 0"):
        make_plan(config, 2, link_gb_per_s=0.0)
