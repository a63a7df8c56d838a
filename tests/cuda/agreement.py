"""A short run through two expansions, each with another layout and another engine: what ranks over
gloo and ranks on the device do alike for ``tools/gpu/agreement.py``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_progressive.config import RunConfig
from megatron_progressive.engines import make_engine
from megatron_progressive.engines.base import Engine, GlobalBatch
from megatron_progressive.expansion.hook import expand
from megatron_progressive.models import model_shape
from megatron_progressive.runtime.late_memory import LateMemory
from megatron_progressive.runtime.layout import make_layout
from tests.engines import on_ranks, reference

STEPS = (2, 1, 1)
"""Of each phase: the first expansion moves state that is no longer zero."""
PROBED = 4
"""Samples of the loss before and after an expansion."""


@dataclass
class Curve:
    """What a run gives, in order."""

    layers: list[str] = field(default_factory=list)
    """Of which make the layers of each phase are."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    across: list[float] = field(default_factory=list)
    """Loss before and after each expansion, on one batch."""
    initial: str = ""
    """A hash of the whole state before the first step."""
    unequal: list[list[str]] = field(default_factory=list)
    """Of each expansion, the tensors that are not, bit for bit, what plain code makes of the whole
    state before it."""
    tensors: int = 0
    """How many were compared."""


def run(config: RunConfig) -> Curve:
    """Train, expand, train, as the configuration says. Collective over the ranks of the world."""
    out = Curve()
    engine = on_ranks.start(config)
    out.initial = _hash(on_ranks.gather(engine.state()))
    done = _steps(engine, config, 0, STEPS[0], out)
    for phase in range(1, len(config.expansion) + 1):
        engine = _expanded(engine, config, phase, out)
        done = _steps(engine, config, done, STEPS[phase], out)
    engine.close()
    return out


def _steps(engine: Engine, config: RunConfig, done: int, count: int, out: Curve) -> int:
    from megatron_progressive.engines.megatron.kernels import kernels_here

    shape: Any = engine.shape
    fused = kernels_here(config, shape, engine.layout).transformer_engine
    out.layers.append("Transformer Engine" if fused else "local")
    samples = config.train.global_batch
    for number in range(done, done + count):
        metrics = engine.train_step(GlobalBatch(on_ranks.tokens, samples * number, samples), 0.01)
        out.losses.append(metrics.loss)
        out.norms.append(metrics.grad_norm)
    return done + count


def _build(config: RunConfig, phase: int, memory: LateMemory) -> Engine:
    layout = make_layout(config.parallel_after(phase), dist.get_world_size())
    depth = config.expansion[phase - 1].to_layers
    return make_engine(config, model_shape(config, depth), layout, memory)


def _expanded(engine: Engine, config: RunConfig, phase: int, out: Curve) -> Engine:
    expansion, layers = config.expansion[phase - 1], engine.shape.num_layers
    before = on_ranks.gather(engine.state())
    probe = GlobalBatch(on_ranks.tokens, 10_000, PROBED)
    build = partial(_build, config, phase)
    engine, event = expand(engine, expansion, build, probe, config.run.seed, phase, 1 << 14)
    out.across += [event.loss_before, event.loss_after]
    after = on_ranks.gather(engine.state())
    adam = config.optim.name == "adamw"
    expected = reference.expanded(
        before, engine.shape, layers, expansion.init, expansion.order, expansion.insert,
        expansion.optimizer_state, config.run.seed, lambda _: adam, generation=phase,
    )  # fmt: skip
    names = sorted(after.keys() | expected.keys())
    out.unequal.append(["/".join(key) for key in names if not _equal(after, expected, key)])
    out.tensors += len(names)
    return engine


def _equal(a: on_ranks.Full, b: on_ranks.Full, key: tuple[str, str]) -> bool:
    both = key in a and key in b
    return both and a[key].dtype == b[key].dtype and torch.equal(a[key], b[key])


def _hash(full: on_ranks.Full) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(full.items()):
        digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
