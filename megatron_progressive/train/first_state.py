"""The state with which a job begins: drawn, taken from another model, or resumed."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_progressive.checkpoints import checkpoint
from megatron_progressive.checkpoints.checkpoint import TrainingPosition
from megatron_progressive.checkpoints.record import DepthHistory
from megatron_progressive.config import RunConfig
from megatron_progressive.engines.base import Engine
from megatron_progressive.models import tensor_table
from megatron_progressive.reshard.initial_values import initialise_all


def set_first_state(
    engine: Engine, config: RunConfig, resumed: TrainingPosition | None
) -> DepthHistory:
    """Give a new engine the state of the checkpoint at ``resumed``, the weights of
    ``run.init_from``, or initial values. Collective over all ranks.

    Returns: the depths that the model has had, with the steps after which it got them.
    """
    state = engine.state()
    history: DepthHistory = ((0, engine.shape.num_layers),)
    if resumed is not None:
        path = checkpoint.checkpoint_path(config.folder, resumed.step)
        checkpoint.load(state, path)
        history = checkpoint.read_description(path)[1].depth_history
    elif config.run.init_from is not None:
        # rank 0's: where it was given as a run's folder, that run may have saved meanwhile
        source = [config.run.init_from]
        dist.broadcast_object_list(source)
        checkpoint.load_weights(state, Path(source[0]))
    else:
        initialise_all(state, tensor_table(engine.shape), config.run.seed)
    engine.loaded()
    return history
