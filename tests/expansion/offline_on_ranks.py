"""What ranks do in the tests of offline expansion."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_progressive.checkpoints import checkpoint
from megatron_progressive.checkpoints.checkpoint import TrainingPosition
from megatron_progressive.checkpoints.record import record_of_run
from megatron_progressive.config import RunConfig
from megatron_progressive.engines import make_engine
from megatron_progressive.models import model_shape
from megatron_progressive.runtime.layout import make_layout
from tests.engines import on_ranks
from tests.engines.on_ranks import Full


def saved_and_expanded(config: RunConfig, folder: Path, steps: int) -> Full:
    """Train, save as ``step_0000002`` and expand in memory; the whole state after that."""
    engine = on_ranks.start(config)
    for number in range(steps):
        on_ranks.step(engine, number)
    layers = engine.shape.num_layers
    model = record_of_run(config, engine.shape, engine.layout, ((0, layers),))
    position = TrainingPosition(2, 0, layers, 16, 1e6, 0.0, 0.0)
    checkpoint.save(engine.state(), folder, position, model, keep=0)
    if not config.expansion:
        engine.close()
        return {}
    engine, _ = on_ranks._expand(engine, config)
    after = on_ranks.gather(engine.state())
    engine.close()
    return after


def loaded(config: RunConfig, layers: int, path: Path) -> Full:
    """Whole state of an engine that loaded a checkpoint."""
    layout = make_layout(config.parallel, dist.get_world_size())
    engine = make_engine(config, model_shape(config, layers), layout)
    checkpoint.load(engine.state(), path)
    engine.loaded()
    full = on_ranks.gather(engine.state())
    engine.close()
    return full
