"""What ranks do in the tests of the planner."""

from __future__ import annotations

from collections import Counter

from megatron_progressive.config import RunConfig
from megatron_progressive.models import tensor_table
from megatron_progressive.state.boxes import WEIGHT_SLOTS
from tests.engines.cases import start


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
