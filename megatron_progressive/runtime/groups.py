"""Process groups: Megatron-core's ``parallel_state``, made switchable and completely released.

Megatron-core keeps one set of groups in module globals. At an expansion two engines with different
layouts are alive at once, so each keeps its own set here and puts it into place with
:meth:`ProcessGroups.activate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.transformer.moe import fused_a2a, moe_logging
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_progressive.runtime.layout import RANK_ORDER, Layout


def _parallel_state_globals() -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and name.strip("_").isupper()
    }


@contextmanager
def _one_group_for_the_same_ranks() -> Iterator[None]:
    """Let one process group serve wherever Megatron-core makes several with the same ranks. It
    makes some thirty groups, most of them with the ranks of another one.

    On gloo each group costs connections and four threads in every member. Groups of NCCL are left
    as they are, since each is a stream of its own.
    """
    if dist.get_backend() != "gloo":
        yield
        return
    create, known = parallel_state.create_group, {}

    def create_once(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        if tuple(ranks) not in known:
            known[tuple(ranks)] = create(ranks, *args, **kwargs)
        return known[tuple(ranks)]

    parallel_state.create_group = create_once
    try:
        yield
    finally:
        parallel_state.create_group = create


@contextmanager
def _made_when_used() -> Iterator[None]:
    """NCCL's communicators of groups that are made here come with their first use.

    Below a world group that is bound to a device torch makes all at once, with the help of all
    ranks: some thirty on each, most of which Megatron-core never uses, each with buffers.
    """
    world: Any = dist.group.WORLD
    bound = world.bound_device_id
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound


def _forget_metrics() -> None:
    """Drop the sums by layer that Megatron-core keeps in globals for its log: their size is the
    depth of the first model, and they belong to its groups."""
    moe_logging.destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker = {}


def _forget_angles() -> None:
    """Empty the caches of the angles of rotary embeddings. They keep those modules alive, and with
    them the groups of closed engines. The next step of a living engine fills them again."""
    RotaryEmbedding.forward.cache_clear()
    YarnRotaryEmbedding.forward.cache_clear()


def _forget_dispatch_buffer() -> None:
    """Drop DeepEP's buffer, which Megatron-core keeps in a global with the group that it is of."""
    fused_a2a._buffer = None


class ProcessGroups:
    """The process groups of one layout. Making them is collective over all ranks."""

    def __init__(self, layout: Layout) -> None:
        _forget_metrics()
        before = set(c10d._world.pg_map)
        parallel_state.destroy_model_parallel()  # clears the globals; groups stay with their owner
        with _one_group_for_the_same_ranks(), _made_when_used():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tensor,
                pipeline_model_parallel_size=layout.pipeline,
                virtual_pipeline_model_parallel_size=layout.virtual_pipeline
                if layout.virtual_pipeline > 1
                else None,
                context_parallel_size=layout.context,
                expert_model_parallel_size=layout.expert,
                expert_tensor_parallel_size=layout.expert_tensor,
                create_gloo_process_groups=False,
                order=RANK_ORDER,
            )
        self._globals = _parallel_state_globals()
        self._created = [group for group in c10d._world.pg_map if group not in before]
        self.layout = layout
        self.tensor_rank: int = parallel_state.get_tensor_model_parallel_rank()
        self.pipeline_rank: int = parallel_state.get_pipeline_model_parallel_rank()
        # among the ranks that divide samples, and among those that divide each sample
        self.data_rank: int = parallel_state.get_data_parallel_rank()
        self.context_rank: int = parallel_state.get_context_parallel_rank()
        # among those that hold the same part of the model, which are both of these together
        self.replica_rank: int = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        self.expert_rank: int = parallel_state.get_expert_model_parallel_rank()
        self.expert_tensor_rank: int = parallel_state.get_expert_tensor_parallel_rank()
        self.expert_data_rank: int = parallel_state.get_expert_data_parallel_rank()
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.replica_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.model_group = parallel_state.get_model_parallel_group()
        self.expert_tensor_group = parallel_state.get_expert_tensor_parallel_group()
        self.expert_data_group = parallel_state.get_expert_data_parallel_group()
        self.expert_model_group = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
        # of the ranks with a copy of the embedding; None where this is none of them
        self.embedding_group = parallel_state.get_embedding_group(check_initialized=False)
        # of all ranks whose distributed optimizers share one state
        self.optimizer_group = parallel_state.get_intra_distributed_optimizer_instance_group()

    @property
    def first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline_rank == self.layout.pipeline - 1

    def activate(self) -> None:
        """Make these the groups that Megatron-core uses."""
        _forget_metrics()
        for name, value in self._globals.items():
            setattr(parallel_state, name, value)

    def close(self) -> None:
        """Destroy the groups, which Megatron-core would only forget. Collective over all ranks."""
        _forget_metrics()
        _forget_angles()
        _forget_dispatch_buffer()
        current = _parallel_state_globals()
        if current.get("_MODEL_PARALLEL_GROUP") is self._globals["_MODEL_PARALLEL_GROUP"]:
            parallel_state.destroy_model_parallel()
            for name, value in _parallel_state_globals().items():  # it leaves one
                if isinstance(value, dist.ProcessGroup):
                    setattr(parallel_state, name, None)
        for group in self._created:
            if group in c10d._world.pg_map:
                dist.destroy_process_group(group)
        self._created = []
        self._globals = {}
        del self.tensor_group, self.replica_group, self.model_group
        del self.expert_tensor_group, self.expert_data_group, self.expert_model_group
        del self.embedding_group, self.optimizer_group
