"""What happens at τ: the expansion hook, which the training loop calls.

The hook builds the target engine beside the old one, fills every box of it by the depth map, checks
the loss on one batch before and after, and closes the old engine. The old one's gradients go before
anything is built; a tensor of its state goes once all who need it have it, and one of the target's
has memory from when it is filled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_progressive.config import ExpansionSection
from megatron_progressive.engines.base import Engine, GlobalBatch
from megatron_progressive.expansion.depth_map import COPY, INIT, TensorRule, copied_from, rules_of
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.reshard.boxes import WEIGHT_SLOTS, ShardedState
from megatron_progressive.reshard.initial_values import initialise
from megatron_progressive.reshard.transfer import TransferStats, transfer
from megatron_progressive.runtime.agreement import all_succeed
from megatron_progressive.runtime.late_memory import LateMemory
from megatron_progressive.runtime.memory import collect


@dataclass(frozen=True)
class ExpansionEvent:
    """What happened at τ, as ``metrics.jsonl`` records it."""

    from_layers: int
    to_layers: int
    init: str
    state_policy: str
    layout_before: str
    layout_after: str
    seconds: float
    """How long training paused for building, moving and releasing, without the two checks of the
    loss."""
    bytes_moved: int
    """Bytes that were sent between ranks, over all ranks."""
    peak_bytes: int
    """The most bytes on a rank while state moved: what is left of the old state, what has come of
    the target's, and what is staged, without gradients."""
    loss_before: float
    loss_after: float
    """The loss on the same batch as ``loss_before``."""


def apply_rules(
    source: ShardedState,
    target: ShardedState,
    rules: dict[str, TensorRule],
    table: dict[str, TensorSpec],
    seed: int,
    generation: int,
    staging_bytes: int,
    memory: LateMemory,
) -> TransferStats:
    """Fill every target piece: copied boxes by :func:`transfer`, the others in place. Collective
    over all ranks.

    A slot that a rule copies comes from the same slot of the source tensor. The source has no
    memory afterwards.

    Args:
        memory: gives the target's pieces theirs.
    """
    stats = transfer(source, target, copied_from(rules), staging_bytes, memory)
    for piece in target.pieces:
        memory.give_zeros(piece.data.untyped_storage())
    new = [p for p in target.pieces if rules[p.name].action(p.slot) == INIT]
    initialise(new, table, seed, generation)
    for piece in target.pieces:
        action = rules[piece.name].action(piece.slot)
        if action != INIT and action != COPY and piece.slot in WEIGHT_SLOTS:
            piece.data.zero_()  # a new engine's optimizer state is zero already
    return stats


def expand(
    old: Engine,
    expansion: ExpansionSection,
    build: Callable[[LateMemory], Engine],
    probe: GlobalBatch,
    seed: int,
    generation: int,
    staging_bytes: int,
) -> tuple[Engine, ExpansionEvent]:
    """Replace ``old`` by a deeper engine, in the running job. Collective over all ranks.

    A rank that fails before every rank has its part of the new engine makes all of them fail
    (:func:`.agreement.all_succeed`). The old engine is of no use then: whoever calls this has saved
    before.

    Args:
        build: makes the target engine, whose weights may be anything and whose state has no memory
            yet.
        probe: the batch of ``loss_before`` and ``loss_after``.
        seed, generation: the key of the new layers' initial weights (:mod:`.initial_values`); no
            other expansion of the job has the same generation.
        staging_bytes: the most bytes that a rank stages for sending and receiving.

    Raises:
        RankFailed: another rank failed.
    """
    loss_before = old.evaluate([probe])
    started = time.perf_counter()
    with all_succeed(f"expansion {generation}"):
        memory = LateMemory()
        old.drop_gradients()
        new = build(memory)
        table = tensor_table(new.shape)
        rules = rules_of(expansion, old.shape, new.shape)
        with memory.views():
            target = new.state()
        source = old.state()
        stats = apply_rules(source, target, rules, table, seed, generation, staging_bytes, memory)
        collect()  # what building has left behind would get memory, too
        memory.give_rest()  # gradients
        new.loaded()
    event = ExpansionEvent(
        from_layers=old.shape.num_layers,
        to_layers=new.shape.num_layers,
        init=expansion.init,
        state_policy=expansion.optimizer_state,
        layout_before=str(old.layout),
        layout_after=str(new.layout),
        seconds=0.0,
        bytes_moved=stats.bytes_moved,
        peak_bytes=stats.peak_bytes,
        loss_before=loss_before,
        loss_after=0.0,
    )
    old.close()
    new.activate()
    seconds = time.perf_counter() - started
    loss_after = new.evaluate([probe])
    return new, replace(event, seconds=seconds, loss_after=loss_after)
