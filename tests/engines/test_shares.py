"""A learning rate of their own for the layers that are new: on every engine, layout and rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_progressive.config import RunConfig
from megatron_progressive.data import open_data
from megatron_progressive.engines.base import GlobalBatch
from megatron_progressive.expansion.depth_map import new_tensors
from megatron_progressive.models import model_shape
from tests.engines import on_ranks, resnet_on_ranks
from tests.pool import Pool

SHARE = 0.25
NEW = ["schedule.rewarm=0.1", "schedule.rewarm_layers=new"]
GROWTH: dict[str, Any] = {"at": 3, "to_layers": 4, "init": "copying"}


def after_one_step(config: RunConfig, names: list[str]) -> tuple[Any, ...] | None:
    """The weights before and after a step, and after the same step with all shares and with none
    of the learning rate for ``names`` (rank 0 has them)."""
    read = open_data(config).train_batch if config.model.family == "resnet" else on_ranks.tokens
    found = []
    for shares in (None, {}, dict.fromkeys(names, SHARE), dict.fromkeys(names, 0.0)):
        engine = on_ranks.start(config, config.expansion[0].to_layers)
        if shares is not None:
            batch = GlobalBatch(read, 0, config.train.global_batch)
            engine.train_step(batch, 0.01, shares=shares)
        found.append(on_ranks.gather(engine.state()))
        engine.close()
    return tuple(found) if dist.get_rank() == 0 else None


CASES: list[tuple[str, int, list[str]]] = [
    ("gpt2", 1, ["optim.name=adamw"]),
    ("gpt2", 1, ["optim.name=muon_nsgd"]),
    ("gpt2", 2, ["optim.name=adamw", "parallel.zero_stage=0", "train.precision=bf16"]),
    ("gpt2", 2, ["optim.name=muon_nsgd", "parallel.zero_stage=0"]),
    ("gpt2", 4, ["optim.name=adamw", "parallel.tensor=2"]),
    ("gpt2", 4, ["optim.name=muon_nsgd", "parallel.pipeline=2", "model.tie_embeddings=true"]),
    ("gpt2", 4, ["optim.name=muon_nsgd", "parallel.tensor=2", "optim.embeddings=adamw"]),
    ("mixtral", 2, ["optim.name=adamw", "parallel.expert=2"]),
    ("gpt2", 2, ["optim.name=adamw", "parallel.engine=deepspeed", "parallel.zero_stage=0"]),
    ("gpt2", 2, ["optim.name=muon_nsgd", "parallel.engine=deepspeed", "parallel.zero_stage=3"]),
    ("gpt2", 2, ["optim.name=adamw", "parallel.engine=deepspeed", "parallel.zero_stage=2"]),
    ("resnet", 2, ["optim.name=muon_nsgd"]),
    ("resnet", 2, ["optim.name=adamw", "parallel.zero_stage=0"]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "world", "words"), CASES)
def test_new_layers_move_by_their_share_and_others_as_without(
    pool: Pool, family: str, world: int, words: list[str]
) -> None:
    words = ["model.num_layers=2", "train.micro_batch=1", *NEW, *words]
    if family == "resnet":
        words[1] = "train.micro_batch=2"
        config = resnet_on_ranks.small_config(words, GROWTH)
    else:
        config = on_ranks.family_config(family, words, GROWTH)
    shapes = model_shape(config), model_shape(config, 4)
    names = new_tensors(config.expansion[0], *shapes)
    assert names
    results = pool.run(world, after_one_step, config, names)[0]
    assert results is not None
    start, whole, part, none = results
    weights = "master" if ("embedding.word_embeddings.weight", "master") in start else "param"
    new, moved = set(names), 0
    for key, value in start.items():
        name, slot = key
        if name not in new or slot not in ("param", "master"):  # momentum knows no rate
            assert torch.equal(whole[key], part[key]), key
            assert torch.equal(whole[key], none[key]), key
        elif slot == weights:
            assert torch.equal(none[key], value), key
            step = whole[key] - value
            moved += bool(step.abs().max() > 0)
            torch.testing.assert_close(part[key] - value, SHARE * step, rtol=2e-4, atol=2e-7)
    assert moved
