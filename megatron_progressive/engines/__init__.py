"""The engines by name. Importing this package costs nothing; making an engine imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_progressive.config import RunConfig
from megatron_progressive.models.base import ModelShape, TransformerShape
from megatron_progressive.models.families.resnet import ResNetShape
from megatron_progressive.runtime.layout import Layout

if TYPE_CHECKING:  # planning reads engines/partitions.py without loading torch
    from megatron_progressive.engines.base import Engine
    from megatron_progressive.runtime.late_memory import LateMemory


def make_engine(
    config: RunConfig, shape: ModelShape, layout: Layout, memory: LateMemory | None = None
) -> Engine:
    """A new engine of ``layout.engine``, whose weights are unset. Collective over all ranks.

    Args:
        memory: gives the engine's state its memory later; without one the engine has it at once.
    """
    if layout.engine == "torch":
        from megatron_progressive.engines.torch.engine import TorchEngine

        assert isinstance(shape, ResNetShape)  # preflight refuses others
        return TorchEngine(config, shape, layout, memory)
    assert isinstance(shape, TransformerShape)
    if layout.engine == "deepspeed":
        from megatron_progressive.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(config, shape, layout, memory)
    from megatron_progressive.engines.megatron.engine import MegatronEngine

    return MegatronEngine(config, shape, layout, memory)
