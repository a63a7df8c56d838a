"""What ranks do in the DeepSpeed engine's tests; each call loops over several cases."""

from __future__ import annotations

import gc
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_progressive.config import RunConfig
from megatron_progressive.engines import make_engine
from megatron_progressive.engines.base import Engine, GlobalBatch
from megatron_progressive.expansion.hook import expand
from megatron_progressive.models import model_shape
from megatron_progressive.optim import flat
from megatron_progressive.reshard.boxes import ShardedState, whole
from megatron_progressive.runtime import distributed
from megatron_progressive.runtime.late_memory import LateMemory
from megatron_progressive.runtime.layout import make_layout
from tests.engines import on_ranks

Run = tuple[list[tuple[float, float]], on_ranks.Full]


def batch(number: int) -> GlobalBatch:
    """Two micro-batches of two samples on each rank, whatever their number."""
    count = 4 * dist.get_world_size()
    return GlobalBatch(on_ranks.tokens, count * number, count)


def train(config: RunConfig, steps: int, exchange_numel: int | None = None) -> Run:
    """Losses and gradient norms of each step, and the whole state after them."""
    before = flat.EXCHANGE_NUMEL
    flat.EXCHANGE_NUMEL = exchange_numel or before
    engine = on_ranks.start(config)
    metrics = [engine.train_step(batch(number), 0.01) for number in range(steps)]
    state = on_ranks.gather(engine.state())
    check_saved_once(engine.state())
    engine.close()
    flat.EXCHANGE_NUMEL = before
    return [(m.loss, m.grad_norm) for m in metrics], state


def check_saved_once(state: ShardedState) -> None:
    """Each element of each tensor is in exactly one rank's piece of replica 0."""
    mine = [(p.key, p.global_shape, p.box) for p in state.pieces if not p.replica]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    counts: dict[Any, torch.Tensor] = {}
    for key, shape, box in (piece for pieces in everyone for piece in pieces):
        count = counts.setdefault(key, torch.zeros(shape, dtype=torch.int))
        count[box.slices_within(whole(shape))] += 1
    for key, count in counts.items():
        assert bool((count == 1).all()), key


def against_megatron(
    pairs: list[tuple[RunConfig, list[RunConfig]]], steps: int, exchange_numel: int | None
) -> list[tuple[int, int, float, float, tuple[float, str]]]:
    """Largest relative differences of (losses, norms, state and where) of each DeepSpeed run to
    its Megatron run; the indices say which. Raises on slots that one has and the other has not."""
    found = []
    for i, (reference, runs) in enumerate(pairs):
        expected, expected_state = train(reference, steps)
        for j, config in enumerate(runs):
            got, state = train(config, steps, exchange_numel)
            assert state.keys() == expected_state.keys(), state.keys() ^ expected_state.keys()
            loss, norm = (
                max(abs(a[k] / b[k] - 1) for a, b in zip(got, expected, strict=True))
                for k in (0, 1)
            )
            worst = max(
                (
                    float((value.float() - state[key].float()).abs().max())
                    / max(float(value.float().abs().max()), 1e-6),
                    "/".join(key),
                )
                for key, value in expected_state.items()
            )
            found.append((i, j, loss, norm, worst))
    return found


def _expanded(engine: Engine, config: RunConfig) -> Engine:
    def build(memory: LateMemory) -> Engine:
        layout = make_layout(config.parallel_after(1), dist.get_world_size())
        depth = config.expansion[0].to_layers
        return make_engine(config, model_shape(config, depth), layout, memory)

    return expand(engine, config.expansion[0], build, batch(1000), config.run.seed, 1, 1 << 14)[0]


def expansions(configs: list[RunConfig]) -> list[tuple[on_ranks.Full, on_ranks.Full, list[str]]]:
    """Whole state before and after each expansion, and the weights that the next step left."""
    results = []
    for config in configs:
        engine = on_ranks.start(config)
        for number in range(2):
            engine.train_step(batch(number), 0.01)
        before = on_ranks.gather(engine.state())
        engine = _expanded(engine, config)
        after = on_ranks.gather(engine.state())
        metrics = engine.train_step(batch(2), 0.01)
        assert 0 < metrics.loss < 20, metrics
        moved = on_ranks.gather(engine.state())
        slot = "master" if config.train.precision == "bf16" else "param"
        still = [k[0] for k in after if k[1] == slot and torch.equal(after[k], moved[k])]
        # what the model computes with follows what the optimizer updates
        for name, kind in after:
            if kind == "master":
                assert torch.equal(moved[name, "master"].bfloat16(), moved[name, "param"]), name
        engine.close()
        results.append((before, after, still))
    return results


def _plain(thing: Any) -> bool:
    return type(thing) in (torch.Tensor, torch.nn.Parameter)


def output(configs: list[RunConfig]) -> str:
    """What building, training and closing engines writes to the terminal."""
    distributed.prepare_imports()
    with tempfile.TemporaryFile() as file:
        saved = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            for config in configs:
                train(config, 2)
        finally:
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
        file.seek(0)
        return file.read().decode()


def losses_after_expansion(configs: list[RunConfig], steps: int) -> list[list[float]]:
    """Of each run, the losses of the steps after an expansion that follows three."""
    results = []
    for config in configs:
        engine = on_ranks.start(config)
        for number in range(3):
            engine.train_step(batch(number), 0.003)
        engine = _expanded(engine, config)
        results.append([engine.train_step(batch(3 + n), 0.003).loss for n in range(steps)])
        engine.close()
    return results


@dataclass(frozen=True)
class Resources:
    """What a process has after an engine was closed."""

    groups: int
    files: int
    threads: int
    resident_bytes: int
    tensors: int


def resources_over_expansions(configs: list[RunConfig]) -> list[Resources]:
    """After each of several expansions, every one from a fresh engine."""
    import psutil
    import torch.distributed.distributed_c10d as c10d

    found = []
    for config in configs:
        engine = on_ranks.start(config)
        engine.train_step(batch(0), 0.003)
        engine = _expanded(engine, config)
        engine.train_step(batch(1), 0.003)
        engine.close()
        del engine
        gc.collect()
        own = psutil.Process()
        tensors = sum(_plain(thing) for thing in gc.get_objects())
        found.append(
            Resources(
                len(c10d._world.pg_map), own.num_fds(), own.num_threads(),
                own.memory_info().rss, tensors,
            )
        )  # fmt: skip
    return found
