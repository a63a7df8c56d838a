"""What ranks do in the tests on the stand-in device, beside what others do over gloo."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_progressive.config import RunConfig
from tests.engines.on_ranks import expand_and_gather


def device_of_rank() -> tuple[str, str]:
    """The backend of the world group and the device of a new engine's tensors."""
    return dist.get_backend(), torch.cuda.get_device_name()


def through_an_expansion(config: RunConfig) -> dict[str, Any]:
    """Whole state before and after an expansion, bytes moved, and losses, as plain numbers."""
    before, after, event, losses = expand_and_gather(config)
    return {
        "before": before,
        "after": after,
        "bytes_moved": event.bytes_moved,
        "losses": [event.loss_before, event.loss_after, *losses],
    }


def losses_through_an_expansion(config: RunConfig) -> list[float]:
    """The two of the expansion, and of the two steps after it."""
    _, _, event, losses = expand_and_gather(config)
    return [event.loss_before, event.loss_after, *losses]


def layers_and_losses(config: RunConfig) -> tuple[str, list[float]]:
    """Which layers the model is made of here, and :func:`losses_through_an_expansion`."""
    from megatron_progressive.engines.megatron.kernels import kernels_here
    from megatron_progressive.models import transformer_shape
    from megatron_progressive.runtime.layout import make_layout

    layout = make_layout(config.parallel, dist.get_world_size())
    kernels = kernels_here(config, transformer_shape(config), layout)
    layers = "transformer_engine" if kernels.transformer_engine else "local"
    return layers, losses_through_an_expansion(config)
