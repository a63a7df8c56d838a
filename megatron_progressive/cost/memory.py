"""Bytes of model and optimizer state on the fullest rank of a layout, found without allocating
anything.

Activations, communication buffers and what an optimizer step needs for a moment (a gathered matrix
under Newton-Schulz, for example) are not counted. Experts are divided over the expert-parallel
ranks, each expert over the expert-tensor-parallel ranks, and their optimizer state over the ranks
that hold the same experts. Biases of routers are fp32 and have neither gradient nor optimizer
state. The shares of a divided state are taken as equal; shares of whole tensors (Muon-NSGD on
Megatron-core) are up to 5 % larger.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from megatron_progressive.config import RunConfig
from megatron_progressive.engines.partitions import chunk_tensors
from megatron_progressive.models.base import ModelShape, TensorSpec
from megatron_progressive.optim.rules import ADAMW, rule_of
from megatron_progressive.runtime.layout import Layout

_FP32_BYTES = 4
BYTES = {"fp32": 4, "bf16": 2}

MASTER, MOMENTUM, MOMENTS = "master weights", "momentum", "AdamW moments"


@dataclass(frozen=True)
class RankMemory:
    """The bytes of state on one rank."""

    stage: int
    """The pipeline stage of the rank."""
    parameters: int
    gradients: int
    """Bytes of the gradient sums, which are fp32 in every precision."""
    optimizer: dict[str, int] = field(default_factory=dict)
    """Bytes of each kind of optimizer state, all fp32: master weights, momentum and AdamW's
    moments."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + sum(self.optimizer.values())


def stage_tensors(shape: ModelShape, layout: Layout) -> list[list[TensorSpec]]:
    """The tensors of each pipeline stage, including copies of the embedding."""
    return [
        [tensor.spec for chunk in chunks for tensor in chunk]
        for chunks in chunk_tensors(shape, layout)
    ]


def _held(spec: TensorSpec, numel: int, layout: Layout) -> int:
    """The number of elements of a tensor of ``numel`` on one of the ranks that hold part of it."""
    ranks = layout.tensor if spec.expert is None else layout.expert_tensor
    return numel // (ranks if spec.tp_axis is not None else 1)


def rank_memory(
    stage: int, sized: list[tuple[TensorSpec, int]], config: RunConfig, layout: Layout
) -> RankMemory:
    """The memory of one rank of a stage with these tensors, each with its number of elements (for a
    tensor that stands for several, with theirs together). The rank's experts are as many as those
    of any other rank of the stage."""
    optim, precision = config.optim, config.train.precision
    zero, deepspeed = layout.zero_stage, layout.engine == "deepspeed"
    divided = divides_state(layout)
    sizes: dict[str, int] = defaultdict(int)
    weights = gradients = 0
    fixed = _FP32_BYTES * sum(numel for spec, numel in sized if not spec.trainable)
    for experts in (False, True):
        members = [
            (spec, _held(spec, numel, layout))
            for spec, numel in sized
            if spec.trainable and (spec.expert is not None) == experts
        ]
        share, ranks = (layout.expert, layout.expert_data) if experts else (1, layout.replicas)
        held = sum(numel for _, numel in members) // share
        adamw = sum(n for spec, n in members if rule_of(spec, optim) == ADAMW) // share
        state = {
            # an fp32 model is its own master; DeepSpeed's partitions are copies all the same
            MASTER: held if precision == "bf16" or (deepspeed and zero >= 1) else 0,
            MOMENTUM: held - adamw,
            MOMENTS: 2 * adamw,
        }
        for kind, count in state.items():
            sizes[kind] += -(-count // (ranks if divided else 1)) * _FP32_BYTES
        weights += -(-held // ranks) if deepspeed and zero == 3 else held
        gradients += -(-held // ranks) if deepspeed and zero >= 2 else held
    return RankMemory(
        stage=stage,
        parameters=weights * BYTES[precision] + fixed,
        gradients=gradients * _FP32_BYTES,
        optimizer={kind: size for kind, size in sizes.items() if size},
    )


def divides_state(layout: Layout) -> bool:
    """Whether the optimizer state is divided over data-parallel ranks: by Megatron-core's
    distributed optimizer, for Muon-NSGD in whole tensors where they fit, or by DeepSpeed's ZeRO."""
    return layout.zero_stage >= 1


def stage_memory(shape: ModelShape, config: RunConfig, layout: Layout) -> list[RankMemory]:
    """The memory of a rank of each pipeline stage; ranks of one stage hold the same amount."""
    stages = enumerate(stage_tensors(shape, layout))
    return [
        rank_memory(stage, [(spec, spec.numel) for spec in specs], config, layout)
        for stage, specs in stages
    ]


def largest_rank(shape: ModelShape, config: RunConfig, layout: Layout) -> RankMemory:
    """The memory of the rank that holds most."""
    return max(stage_memory(shape, config, layout), key=lambda memory: memory.total)
