"""Optimizers of the Megatron engine: Megatron-core's wrappers around torch's and our own.

There are three wrappers, all of them Megatron-core's: the distributed optimizer (ZeRO stage 1) and,
where the state is on every data-parallel rank, the optimizer with fp32 master weights (bf16) and
the fp32 optimizer. They are built directly and not through ``get_megatron_optimizer``, which takes
Transformer Engine's FusedAdam where it finds it: that has one step count for a whole group, while
layers that are new at τ start at step zero.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)

from megatron_progressive.config import OptimSection
from megatron_progressive.engines.megatron.owner_optimizer import OwnerOptimizer, WholeOptimizer
from megatron_progressive.models.base import TensorSpec, layer_of
from megatron_progressive.optim.lr_factor import lr_factor
from megatron_progressive.optim.rules import ADAMW
from megatron_progressive.runtime.groups import ProcessGroups

TENSOR = "tensor"
"""The key of a group under which it has the name of one of its tensors."""


def adamw_groups(
    parameters: dict[str, torch.nn.Parameter],
    table: dict[str, TensorSpec],
    optim: OptimSection,
    by_layer: bool = False,
) -> list[dict[str, Any]]:
    """The parameter groups of AdamW, each of tensors with one weight decay and learning rate.
    Vectors have no weight decay.

    Args:
        by_layer: whether each layer may have a learning rate of its own.
    """
    members: dict[tuple[float, float, object], list[str]] = defaultdict(list)
    for name in parameters:
        decay = optim.weight_decay if len(table[name].shape) > 1 else 0.0
        layer = layer_of(name) if by_layer else None
        members[decay, lr_factor(table[name], optim), layer].append(name)
    return [
        # lr is set to the schedule's times lr_factor: the decay, lr x weight_decay, stays
        {
            "params": [parameters[name] for name in names],
            "weight_decay": decay / factor,
            "lr_factor": factor,
            TENSOR: names[0],
        }
        for (decay, factor, _), names in members.items()
    ]


def build_optimizer(
    chunks: list[DistributedDataParallel],
    parameters: dict[str, torch.nn.Parameter],
    table: dict[str, TensorSpec],
    optim: OptimSection,
    groups: ProcessGroups,
    bf16: bool,
    by_layer: bool = False,
) -> ChainedOptimizer:
    """The optimizer of one rank, with its state allocated and zero.

    There is one wrapper for the experts, where they have data-parallel groups of their own, and one
    for everything else.

    ``parameters`` are those of all model chunks. They may be empty: a pipeline stage between the
    first and the last has no tensors while the model has no layers.
    """
    separate = {name for name in parameters if table[name].expert is not None}
    if not groups.layout.separate_experts:
        separate = set()
    wrappers = [
        _wrapper(
            chunks,
            {name: p for name, p in parameters.items() if (name in separate) == experts},
            table,
            optim,
            groups,
            bf16,
            experts,
            by_layer,
        )
        # the norm of the gradient is a sum over the ranks of every wrapper, so all have both
        for experts in ((False, True) if groups.layout.separate_experts else (False,))
    ]
    for wrapper in wrappers[:-1]:
        # Each distributed optimizer would gather the weights of all buffers: the last one does,
        # after all have stepped.
        wrapper._defer_param_sync = True
    return ChainedOptimizer(wrappers)


def _wrapper(
    chunks: list[DistributedDataParallel],
    parameters: dict[str, torch.nn.Parameter],
    table: dict[str, TensorSpec],
    optim: OptimSection,
    groups: ProcessGroups,
    bf16: bool,
    experts: bool,
    by_layer: bool,
) -> MegatronOptimizer:
    sharded = groups.layout.distributed_optimizer
    data_group = groups.expert_data_group if experts else groups.replica_group
    tensor_group = groups.expert_tensor_group if experts else groups.tensor_group
    config = OptimizerConfig(
        optimizer="adam",  # a label: the optimizer object is passed in
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        clip_grad=optim.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=sharded,
    )
    inner: torch.optim.Optimizer | None = None
    if parameters and optim.name == ADAMW:
        # one kernel for all tensors on CUDA; the CPU has none for every type
        fused = torch.cuda.is_available()
        inner = torch.optim.AdamW(
            adamw_groups(parameters, table, optim, by_layer),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=fused,
        )
    elif parameters and sharded:
        inner = OwnerOptimizer(
            list(parameters.values()), optim, data_group.rank(), data_group, tensor_group
        )
    elif parameters:
        inner = WholeOptimizer(list(parameters.values()), optim, tensor_group=tensor_group)
    wrapper: MegatronOptimizer
    if sharded:
        buffers = {
            index: chunk.expert_parallel_buffers if experts else chunk.buffers
            for index, chunk in enumerate(chunks)
        }
        wrapper = _ShardedOptimizer(
            inner,
            config,
            None,
            lambda *_: None,
            model_chunks=chunks,
            per_model_buffers=buffers,
            data_parallel_group=data_group,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=dist.get_rank(
                groups.expert_model_group if experts else groups.model_group
            ),
            distributed_optimizer_instance_id=0,
        )
        wrapper.grad_stats_parallel_group = groups.optimizer_group
    else:
        if bf16:
            wrapper = Float16OptimizerWithFloat16Params(inner, config, None, lambda *_: None)
        else:
            wrapper = FP32Optimizer(inner, config, lambda *_: None)
        wrapper.grad_stats_parallel_group = (
            groups.expert_model_group if experts else groups.model_group
        )
    wrapper.tp_group = groups.tensor_group
    wrapper.expert_tp_group = groups.expert_tensor_group
    if isinstance(inner, OwnerOptimizer):
        inner.attach_shards(wrapper, parameters, table, tensor_group.size(), groups)
    elif isinstance(inner, WholeOptimizer):
        inner.attach_whole(parameters, table, tensor_group.size())
    elif inner is not None:
        _init_adamw_state(inner)
    return wrapper


class _ShardedOptimizer(DistributedOptimizer):  # type: ignore[misc]
    """Megatron-core's distributed optimizer (0.19.2), which copies updated fp32 weights to those
    that the model computes with one by one; here all go in one kernel."""

    def _copy_main_params_to_model_params(self) -> None:
        if self.is_stub_optimizer:
            return
        updated, weights = [], []
        groups = zip(self.shard_fp32_from_float16_groups, self.model_float16_groups, strict=True)
        for shard, parameter in (
            pair for of_group in groups for pair in zip(*of_group, strict=True)
        ):
            span = self._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
            buffer, _, bucket = self.model_param_gbuf_map[parameter]
            flat = self.buffers[buffer].buckets[bucket].param_data.view(-1)
            updated.append(shard)
            weights.append(flat[span.start : span.end])
        # shards of fp32 weights are views of these
        if weights:
            torch._foreach_copy_(weights, updated)


def clip_gradients(optimizer: ChainedOptimizer, most: float) -> list[torch.Tensor]:
    """Scale the gradients so that the norm of all is at most ``most`` (0: leave them).

    What Megatron-core 0.19.2 does without the kernels of Transformer Engine or apex, to the same
    bits on a CPU, but that the host does not wait for the norm of each tensor.

    Returns: squares of norms before, by group of tensors, each a tensor of one number: the norm is
    :func:`norm_of` these.
    """
    wrappers = optimizer.chained_optimizers
    if len(wrappers) == 1 or optimizer.grads_states_parallel_group_is_shared():
        together = [wrappers]  # over the same ranks
    else:
        together = [[wrapper] for wrapper in wrappers]
    squares = [
        _square_of_norm(
            [gradient for one in some for gradient in one.get_grads_for_grad_norm()],
            some[0].get_grad_stats_parallel_group(),
        )
        for some in together
    ]
    if most > 0:
        norm = torch.cat(squares).double().sum().sqrt()
        factor = (most / (norm + 1.0e-6)).clamp_max(1.0).float()
        parameters = [p for wrapper in wrappers for p in wrapper.get_parameters()]
        if gradients := [p.grad for p in parameters if p.grad is not None]:
            torch._foreach_mul_(gradients, factor)
    return squares


def norm_of(squares: list[float]) -> float:
    """The norm of gradients, from the squares that :func:`clip_gradients` has found."""
    norms: list[float] = [square**0.5 for square in squares]
    return norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))


def _square_of_norm(gradients: list[torch.Tensor], group: dist.ProcessGroup) -> torch.Tensor:
    """Over the ranks of a group: one fp32 number, of shape [1]."""
    if gradients:
        norms = torch.stack(torch._foreach_norm(gradients))
        square: torch.Tensor = torch.linalg.vector_norm(norms).view(1) ** 2.0
    else:
        square = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(square, group=group)
    return square


def _init_adamw_state(inner: torch.optim.Optimizer) -> None:
    """Allocate torch AdamW's state as its first step would, without taking that step."""
    fused = inner.defaults["fused"]
    for group in inner.param_groups:
        for parameter in group["params"]:
            step_device = parameter.device if fused else torch.device("cpu")
            inner.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=step_device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
