"""Everything that reads private parts of DeepSpeed 0.19.8: starting and ending an engine, and this
rank's boxes.

The files of that release are ``runtime/zero/stage_1_and_2.py``, ``runtime/zero/stage3.py``,
``runtime/bf16_optimizer.py`` (which takes the place of ZeRO stage 1 in bf16), ``comm/comm.py`` and
``utils/groups.py``. Nothing else in this package touches private parts of DeepSpeed.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_progressive.engines.flat_state import flat_pieces, slot_pieces
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.optim.flat import Cut, FlatOptimizer
from megatron_progressive.reshard.boxes import PARAM, Piece, ShardedState, whole

VERSION = "0.19.8"


def check_version() -> None:
    """Check the version of DeepSpeed. Raises RuntimeError where it is not the one whose private
    parts are used here."""
    found = importlib.metadata.version("deepspeed")
    if found.split("+")[0] != VERSION:
        raise RuntimeError(f"deepspeed: got version {found}; accepted: {VERSION}")


def import_deepspeed() -> Any:
    """DeepSpeed, kept quiet and from compiling anything."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # it calls collectives by names that torch is about to drop
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    from deepspeed.runtime import bf16_optimizer

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Otherwise it is built at the first start, for most of a minute, and a process that is
    # killed meanwhile leaves a lock on which every later one hangs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    bf16_optimizer.see_memory_usage = lambda *_, **__: None  # it prints whatever the log level
    return deepspeed


def start(model: torch.nn.Module, optimizer: FlatOptimizer, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine on the world process group, which is neither made nor copied. Collective
    over all ranks.
    """
    deepspeed = import_deepspeed()
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.utils import groups

    comm.cdb = None  # a handle of an earlier world group, if any
    groups._WORLD_GROUP = dist.group.WORLD  # or it would clone the world, for good
    # Stage 3 numbers modules and parameters over all engines of the process, and asks that the
    # ranks agree: also those that had fewer engines before.
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    partition_parameters.Init.param_id = 0
    # The device that it makes current. It reads this as long as the engine lives.
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    os.environ["LOCAL_RANK"] = str(device)
    # The weights are unset, and may have no memory. It would send the first rank's to all, and
    # stage 3 writes them into a line that nobody prints.
    with (
        mock.patch.object(deepspeed.comm, "broadcast", return_value=None),
        mock.patch.object(torch.nn.Parameter, "__repr__", object.__repr__),
    ):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
    return engine


def close(engine: Any, model: torch.nn.Module, last: bool) -> None:
    """Undo :func:`start`: remove hooks, and what DeepSpeed keeps in globals. The model is of no use
    afterwards.

    Args:
        last: whether no other engine is alive; then what engines share is dropped, too.
    """
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups

    if hasattr(engine.optimizer, "unregister_grad_acc_post_hooks"):
        engine.optimizer.unregister_grad_acc_post_hooks()
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    modules = set(model.modules())
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module not in modules]
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in cached.__closure__:  # a cache over all engines, keyed by module, in a wrapper
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    for module in modules:  # each holds classes that hold it
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            module.__dict__.pop(name, None)
    for parameter in model.parameters():  # each holds methods that are bound to it, and fragments
        parameter.__dict__.clear()
    if last:
        comm.cdb = None
        groups._WORLD_GROUP = None


def attach(
    engine: Any,
    optimizer: FlatOptimizer,
    parameters: dict[str, torch.nn.Parameter],
    table: dict[str, TensorSpec],
    stage: int,
) -> None:
    """Tell the optimizer how ZeRO stage 1, 2 or 3 has cut the parameters into partitions."""
    names = {parameter: name for name, parameter in parameters.items()}
    ranks = dist.get_world_size()
    for group, partition, _ in _partitions(engine, stage):
        cuts, total = [], 0
        for parameter in group:
            name = names[parameter]
            numel = table[name].numel
            if stage == 3:
                size = parameter.ds_tensor.ds_numel
                bounds = [size * rank for rank in range(ranks + 1)]
                offset = total
                total += size
            else:
                size = partition.numel()
                bounds = [size * rank - total for rank in range(ranks + 1)]
                offset = max(0, total - size * optimizer.rank)
                total += numel
            inside = [min(max(bound, 0), numel) for bound in bounds]
            pairs = enumerate(itertools.pairwise(inside))
            ranges = {rank: (start, end) for rank, (start, end) in pairs if start < end}
            cuts.append(Cut(name, table[name], ranges, offset if optimizer.rank in ranges else 0))
        optimizer.attach(partition, partition, cuts)


def _partitions(engine: Any, stage: int) -> Iterator[tuple[list[Any], torch.Tensor, torch.Tensor]]:
    """For each group: its parameters in order, this rank's fp32 partition, and the part of the
    model's weights for which the partition stands."""
    zero, rank = engine.optimizer, dist.get_rank()
    if stage == 3:
        yield from zip(
            zero.fp16_groups,
            zero.fp32_partitioned_groups_flat,
            zero.fp16_partitioned_groups_flat,
            strict=True,
        )
        return
    if hasattr(zero, "bf16_partitioned_groups"):
        parts = (zero.bf16_groups, zero.fp32_groups_flat_partition, zero.bf16_partitioned_groups)
    else:
        parts = (
            zero.bit16_groups,
            zero.single_partition_of_fp32_groups,
            zero.parallel_partitioned_bit16_groups,
        )
    for group, partition, weights in zip(*parts, strict=True):
        yield group, partition, weights[rank]


@torch.no_grad()
def follow_weights(engine: Any, stage: int, bf16: bool) -> None:
    """Let copies follow the weights that were written: fp32 copies that are no master weights take
    their values, and whole weights that stage 3 still has from an earlier pass are dropped. Not
    collective."""
    if stage == 3:
        release(engine)
    if stage and not bf16:
        for _, partition, weights in _partitions(engine, stage):
            partition.data.copy_(weights)


def drop_gradients(engine: Any, stage: int, bf16: bool) -> None:
    """Free the sums of gradients, and fp32 copies of weights that are no master weights."""
    zero = engine.optimizer
    dropped = []
    for bucket in getattr(zero, "ipg_buckets", {}).values():  # in which gradients are reduced
        buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        dropped += [buffer for buffer in buffers if buffer is not None]
    if hasattr(zero, "fp32_groups_gradients_flat"):  # bf16 at stage 1
        dropped += zero.fp32_groups_gradients_flat
    if stage == 3:
        dropped.append(zero.grad_partitions_flat_buffer)
    for _, partition, _ in _partitions(engine, stage):
        partition.grad = None
        if not bf16:
            dropped.append(partition.data)
    for tensor in dropped:
        tensor.untyped_storage().resize_(0)


def release(engine: Any) -> None:
    """Drop the whole weights that stage 3 keeps for their next use."""
    engine.optimizer.parameter_offload.partition_all_parameters()


def sharded_state(
    optimizer: FlatOptimizer,
    parameters: dict[str, torch.nn.Parameter],
    buffers: dict[str, torch.Tensor],
    table: dict[str, TensorSpec],
    stage: int,
    bf16: bool,
) -> ShardedState:
    """Views of every weight and optimizer slot that this rank holds; padding is never exposed.

    Args:
        parameters: the parameters by canonical name.
        buffers: the tensors that the optimizer does not have, by canonical name.
        bf16: whether the optimizer's fp32 weights are master weights; otherwise they follow the
            model's.
    """
    rank = dist.get_rank()
    pieces: list[Piece] = []
    for fragment in optimizer.fragments():
        cut = fragment.cut
        name, shape, parameter = cut.name, cut.spec.shape, parameters[cut.name]
        start, end = cut.range_of(optimizer.rank)
        if stage == 3:
            local: Any = parameter
            pieces.extend(flat_pieces(cut, PARAM, local.ds_tensor[: end - start], start))
        else:
            weight = parameter.data.view(shape)
            pieces.append(Piece(name, PARAM, shape, whole(shape), weight, rank))
        # stage 0 has the slots on every rank
        pieces.extend(slot_pieces(fragment, optimizer.rank, bf16, None if stage else rank))
    for name, buffer in buffers.items():
        shape = table[name].shape
        pieces.append(Piece(name, PARAM, shape, whole(shape), buffer, rank))
    return ShardedState(pieces)
