"""The most bytes of state that a rank holds at an expansion.

The old engine's gradients go before anything is built, and the new one's come last. In between, the
slots of the state go over one after the other (:func:`.reshard.holdings.round_of`): weights, master
weights, then each slot of the optimizer. What is left of the old state goes with each, and what has
come of the new one stays.
"""

from __future__ import annotations

from megatron_progressive.config import RunConfig
from megatron_progressive.cost.memory import MASTER, MOMENTS, MOMENTUM, RankMemory, stage_memory
from megatron_progressive.models import model_shape
from megatron_progressive.runtime.layout import Layout, make_layout


def tau_peak(config: RunConfig, index: int, world: int, staged: int) -> int:
    """The most bytes of state on a rank from before expansion ``index`` to after it. Scratch memory
    of initial values, which on a GPU is the host's, does not count.

    Args:
        staged: the bytes that a rank stages for sending and receiving.

    Raises:
        ConfigError: the ranks do not divide into a layout.
    """
    layouts = [make_layout(config.parallel_after(phase), world) for phase in (index, index + 1)]
    depths = [config.expansion[i].to_layers if i >= 0 else None for i in (index - 1, index)]
    stages = [
        stage_memory(model_shape(config, depth), config, layout)
        for depth, layout in zip(depths, layouts, strict=True)
    ]
    ranks = [layout.tensor * layout.replicas for layout in layouts]  # of a stage
    # where some rank's old or new stage begins
    starts = sorted({first for each in ranks for first in range(0, world, each)})
    return max(
        _rank_peak(
            [memory[rank // each] for memory, each in zip(stages, ranks, strict=True)],
            layouts,
            config.train.precision,
            staged,
        )
        for rank in starts
    )


def _rank_peak(
    memories: list[RankMemory], layouts: list[Layout], precision: str, staged: int
) -> int:
    old, new = (_slots(memory, precision) for memory in memories)
    rounds = [sum(old[number:]) + sum(new[: number + 1]) for number in range(len(old))]
    before, after = (
        _at_rest(memory, layout, precision)
        for memory, layout in zip(memories, layouts, strict=True)
    )
    # views of a buffer are taken while it has its memory for a moment
    building = sum(old) + max(new[0], memories[1].gradients)
    return max(before, building, max(rounds) + staged, after)


def _slots(memory: RankMemory, precision: str) -> list[int]:
    """The bytes of each slot, in the order in which they go over. AdamW has two moments."""
    kinds = memory.optimizer
    moments = kinds.get(MOMENTS, 0)
    # DeepSpeed's fp32 copies of fp32 weights are no slot: they follow the weights
    master = kinds.get(MASTER, 0) if precision == "bf16" else 0
    return [
        memory.parameters, master, moments // 2, moments - moments // 2, kinds.get(MOMENTUM, 0)
    ]  # fmt: skip


def _at_rest(memory: RankMemory, layout: Layout, precision: str) -> int:
    """The bytes between two steps: DeepSpeed keeps gradients only in sums of its own."""
    kept = layout.engine != "deepspeed" or layout.zero_stage == 3
    kept = kept or (precision == "bf16" and layout.zero_stage <= 1)
    return memory.total - (0 if kept else memory.gradients)
