"""The bytes that every rank sends and receives at an expansion, and the initial values that it
draws, found without processes or data.

This takes the pieces of all ranks before and after from :mod:`.engines.partitions`, the source of
each target from the depth map, and the schedule that the expansion itself follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_progressive.config import RunConfig
from megatron_progressive.engines.partitions import held_pieces
from megatron_progressive.expansion.depth_map import INIT, copied_from, rules_of
from megatron_progressive.models import model_shape, tensor_table
from megatron_progressive.reshard.boxes import PARAM
from megatron_progressive.reshard.metadata import PieceTable
from megatron_progressive.reshard.schedule import Schedule
from megatron_progressive.runtime.layout import make_layout

Ints = NDArray[np.int64]

NORMALS_PER_SECOND = 50e6
"""Initial values that one processor core draws (:mod:`.reshard.initial_values`): 54 to 63 million
on the core of a cloud machine that others share."""


@dataclass(frozen=True)
class ReshardBytes:
    """The numbers of one expansion by rank, int64 [world] each."""

    received: Ints
    """Bytes from other ranks: the source elements that a rank needs and does not hold, each once,
    whatever the number of layers to which they are copied."""
    sent: Ints
    """Bytes to other ranks; each box that a rank lacks is sent by one of the ranks that hold it, in
    turn."""
    drawn: Ints
    """The number of normal initial values that a rank draws (no bytes), which are those of the new
    weights that it holds, each once."""

    @property
    def total(self) -> int:
        """The bytes over all ranks. No reshard needs fewer, since each rank gets what it lacks
        once."""
        return int(self.received.sum())

    def seconds(self, gb_per_s: float) -> float:
        """The seconds of the exchange where every rank sends and receives at ``gb_per_s`` (1e9
        bytes per second each way, both at once), which are those of the busiest rank."""
        return max(int(self.received.max()), int(self.sent.max())) / (gb_per_s * 1e9)

    def drawing_seconds(self, cores: int) -> float:
        """Time that the rank which draws most takes, on that many processor cores."""
        return int(self.drawn.max()) / (NORMALS_PER_SECOND * cores)


def reshard_bytes(config: RunConfig, index: int, world: int) -> ReshardBytes:
    """What moves and what is drawn at expansion ``index`` of ``config`` on ``world`` ranks.

    Raises:
        ConfigError: the ranks do not divide into a layout.
    """
    expansion = config.expansion[index]
    depth = config.expansion[index - 1].to_layers if index else None
    source, target = model_shape(config, depth), model_shape(config, expansion.to_layers)
    rules = rules_of(expansion, source, target)
    held = [
        held_pieces(
            shape,
            config.optim,
            config.train.precision,
            make_layout(config.parallel_after(phase), world),
        )
        for phase, shape in ((index, source), (index + 1, target))
    ]
    old = [(PieceTable.of(pieces), ranks) for pieces, ranks in held[0]]
    normal = {name for name, spec in tensor_table(target).items() if spec.init == "normal"}
    fresh = {name for name in normal if rules[name].action(PARAM) == INIT}
    new, drawn = [], np.zeros(world, np.int64)
    for pieces, ranks in held[1]:
        new.append((PieceTable.of(pieces), ranks))
        # master weights are a part of the weights that the rank computes with
        weights = [p.box.numel for p in pieces if p.key[1] == PARAM and p.key[0] in fresh]
        drawn[np.asarray(ranks)] += sum(weights)
    sent, received = Schedule(old, new, copied_from(rules)).bytes_by_rank(world)
    return ReshardBytes(received, sent, drawn)
