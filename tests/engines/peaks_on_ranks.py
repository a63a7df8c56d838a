"""What ranks do in the tests of the memory at τ: one counted expansion."""

from __future__ import annotations

import contextlib
import gc
from unittest.mock import patch

from megatron_progressive.config import RunConfig
from megatron_progressive.engines.deepspeed import engine as deepspeed_engine
from megatron_progressive.engines.deepspeed.engine import DeepSpeedEngine
from megatron_progressive.engines.megatron.engine import MegatronEngine
from tests.cost.live_bytes import LiveBytes
from tests.cost.memory_on_ranks import tensors_of
from tests.engines import on_ranks

STAGED = on_ranks.STAGING
_BUCKET = 1 << 10
"""Elements of gradients that DeepSpeed reduces at once, in place of its 50 million: it keeps the
buffer from step to step."""


def peak_at_tau(config: RunConfig) -> tuple[int, int, int]:
    """Bytes of live tensors of this rank: before an expansion, after it, and the most meanwhile.
    The two losses are left out: activations are no state."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(deepspeed_engine, "_BUCKET_NUMEL", _BUCKET))
        engine = on_ranks.start(config)
        for number in range(2):
            on_ranks.step(engine, number)
        live = LiveBytes(tensors_of(engine))
        before = live.now
        for kind in (MegatronEngine, DeepSpeedEngine):
            stack.enter_context(patch.object(kind, "evaluate", lambda *_: 0.0))
        with live:
            engine, _ = on_ranks._expand(engine, config)
    gc.collect()
    after = live.now
    engine.close()
    return before, after, live.peak
