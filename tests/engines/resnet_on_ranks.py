"""What ranks do in the tests of residual networks."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed as dist

from megatron_progressive import config as configuration
from megatron_progressive.config import RunConfig
from megatron_progressive.data import open_data
from megatron_progressive.engines.base import GlobalBatch
from megatron_progressive.plan.preflight import check_run
from tests.engines import on_ranks
from tests.engines.test_property import SAMPLES, _compare

SMALL: dict[str, Any] = {
    "model": {"family": "resnet", "hidden_size": 8, "resnet": {"stages": "2-3-1", "groups": 4}},
    "data": {"image_size": 12},
    "train": {"global_batch": SAMPLES, "micro_batch": 2, "steps": 20},
    "optim": {"ns_dtype": "fp32"},  # as on a CPU by default, on CUDA too
}


def small_config(words: list[str], expansion: dict[str, Any] | None = None) -> RunConfig:
    values = {**SMALL, "expansion": [expansion] if expansion else []}
    return configuration.from_dict(values, words)


def random_case(seed: int, world: int) -> RunConfig:
    """Any depths, policies, ZeRO stages, precision and optimizer."""
    rng = random.Random(seed)
    source = rng.randint(0, 3)
    copying = ["copying", "copying_zeroL", "copying_zeroN"] if source else []
    expansion = {
        "at": 2,
        "to_layers": rng.randint(source + 1, 6),
        "init": rng.choice(["random", "zero", *copying]),
        "order": rng.choice(["stack", "inter", "last"]),
        "insert": rng.choice(["bottom", "top", "middle"]),
        "optimizer_state": rng.choice(["inherit", "copy", "reset"]),
        "parallel": {"zero_stage": rng.randint(0, 1)},
    }
    words = [
        f"model.num_layers={source}",
        f"model.resnet.block={rng.choice(['basic', 'bottleneck'])}",
        f"model.resnet.stem={rng.choice(['cifar', 'imagenet'])}",
        "optim.ns_steps=1",
        f"optim.name={rng.choice(['adamw', 'muon_nsgd'])}",
        f"optim.embeddings={rng.choice(['muon', 'adamw'])}",
        f"train.precision={rng.choice(['fp32', 'bf16'])}",
        f"train.micro_batch={rng.choice([1, 2]) if world == 2 else 2}",
        f"parallel.zero_stage={rng.randint(0, 1)}",
    ]
    config = small_config(words, expansion)
    check_run(config, world)
    return config


def differences(configs: list[RunConfig]) -> list[list[str]]:
    """Of each case, what is not as the reference says."""
    found = []
    for config in configs:
        read = open_data(config).train_batch
        engine = on_ranks.start(config)
        engine.train_step(GlobalBatch(read, 0, SAMPLES), 0.01)
        before = on_ranks.gather(engine.state())
        engine, _ = on_ranks._expand(engine, config, read)
        after = on_ranks.gather(engine.state())
        metrics = engine.train_step(GlobalBatch(read, SAMPLES, SAMPLES), 0.01)
        stepped = on_ranks.gather(engine.state())
        engine.close()
        found.append(_compare(config, before, after, stepped, metrics.loss))
    return found if dist.get_rank() == 0 else []


def losses_and_norms(config: RunConfig, steps: int) -> list[tuple[float, float]]:
    engine, read = on_ranks.start(config), open_data(config).train_batch
    found = []
    for number in range(steps):
        metrics = engine.train_step(GlobalBatch(read, SAMPLES * number, SAMPLES), 0.01)
        found.append((metrics.loss, metrics.grad_norm))
    engine.close()
    return found


def event_of_expansion(config: RunConfig) -> Any:
    """Of an expansion after three steps."""
    engine, read = on_ranks.start(config), open_data(config).train_batch
    for number in range(3):
        engine.train_step(GlobalBatch(read, SAMPLES * number, SAMPLES), 0.01)
    engine, event = on_ranks._expand(engine, config, read)
    engine.close()
    return event


def updates(config: RunConfig, steps: int) -> dict[str, torch.Tensor]:
    """Whole weights after some steps."""
    engine, read = on_ranks.start(config), open_data(config).train_batch
    for number in range(steps):
        engine.train_step(GlobalBatch(read, SAMPLES * number, SAMPLES), 0.01)
    full = on_ranks.gather(engine.state())
    engine.close()
    return {name: value for (name, slot), value in full.items() if slot == "param"}
