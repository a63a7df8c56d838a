"""What ranks do in the tests of the planner."""

from __future__ import annotations

from collections import Counter

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_progressive.config import RunConfig
from megatron_progressive.models import tensor_table
from megatron_progressive.reshard.boxes import WEIGHT_SLOTS
from tests.engines.on_ranks import start, step


def state_bytes(config: RunConfig) -> dict[str, int]:
    """Bytes of each slot that this rank of a real engine holds, step counts left out, and
    ``elements``: those of weights that have a gradient."""
    engine = start(config)
    table = tensor_table(engine.shape)
    sizes: Counter[str] = Counter()
    for piece in engine.state().pieces:
        if piece.global_shape:
            sizes[piece.slot] += piece.data.numel() * piece.data.element_size()
        if piece.slot == WEIGHT_SLOTS[0] and table[piece.name].trainable:
            sizes["elements"] += piece.data.numel()
    engine.close()
    return dict(sizes)


def step_flops(config: RunConfig) -> int:
    """FLOPs of one train step of a real engine's rank, by torch's counter.

    The counter does not know the CPU's flash attention: attention is in plain products here.
    """
    engine = start(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(engine, 0)
    engine.close()
    return int(counter.get_total_flops())
