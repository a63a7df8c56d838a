"""What ranks do in the test of the planner's activations: one counted train step."""

from __future__ import annotations

import gc
from typing import Any
from unittest.mock import patch

import torch

from megatron_progressive.config import RunConfig
from megatron_progressive.engines.base import GlobalBatch
from megatron_progressive.optim import flat
from tests.cost.live_bytes import LiveBytes
from tests.engines.on_ranks import start


def peak_bytes(config: RunConfig, exchange_numel: int | None = None) -> int:
    """Most bytes of live tensors of this rank during a train step after the first: of two, that
    which held less, for what was sent and not yet let go of at the peak is a matter of luck.

    Args:
        exchange_numel: in place of the optimizer's own number.
    """
    with patch.object(flat, "EXCHANGE_NUMEL", exchange_numel or flat.EXCHANGE_NUMEL):
        return _peak_bytes(config)


def _peak_bytes(config: RunConfig) -> int:
    engine = start(config)
    sequence, vocab = engine.shape.sequence_length, engine.shape.vocab_size

    def tokens(first: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(first)
        return torch.randint(0, vocab, (count, sequence + 1), generator=generator)

    size = config.train.global_batch
    engine.train_step(GlobalBatch(tokens, 0, size), 0.01)
    peaks = []
    for number in (1, 2):
        with LiveBytes(tensors_of(engine)) as live:
            engine.train_step(GlobalBatch(tokens, number * size, size), 0.01)
        peaks.append(live.peak)
    engine.close()
    return min(peaks)


def tensors_of(engine: Any) -> list[torch.Tensor]:
    """Parameters, buffers of gradients, optimizer state, and what else the engine has: all that it
    refers to. What belongs to others, other tests' say, does not count."""
    gc.collect()
    found, seen, stack = [], set(), [engine]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (type, type(gc))):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        stack += [
            other
            for other in gc.get_referents(item)
            if not callable(other) or isinstance(other, torch.nn.Module)
        ]
    return found
