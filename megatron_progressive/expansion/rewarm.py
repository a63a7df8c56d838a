"""New layers that re-warm alone after τ."""

from __future__ import annotations

from megatron_progressive.config import RunConfig
from megatron_progressive.expansion.depth_map import new_tensors
from megatron_progressive.models import model_shape
from megatron_progressive.optim.schedule import rewarmed, rewarms_new_layers


def shares_of_new_layers(config: RunConfig, step: int, expansions: int) -> dict[str, float]:
    """The shares of the learning rate that the tensors of new layers have at a step, after that
    many expansions; empty but while they re-warm alone."""
    share = rewarmed(config, step)
    if share == 1 or not rewarms_new_layers(config):
        return {}
    depths = [None, *(expansion.to_layers for expansion in config.expansion)]
    before, after = (
        model_shape(config, depth) for depth in depths[expansions - 1 : expansions + 1]
    )
    return dict.fromkeys(new_tensors(config.expansion[expansions - 1], before, after), share)
