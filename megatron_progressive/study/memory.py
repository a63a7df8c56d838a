"""Bytes of model and optimizer state on the fullest rank of a layout, without allocating.

Activations, communication buffers and what an optimizer step needs for a moment (a gathered
matrix under Newton-Schulz, for example) are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_progressive.config import OptimSection, RunConfig
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import ModelShape, TensorSpec, layer_number
from megatron_progressive.runtime.layout import Layout

_FP32_BYTES = 4
_BYTES = {"fp32": 4, "bf16": 2}
_EMBEDDINGS = ("embedding", "position", "head")

MASTER, MOMENTUM, MOMENTS = "master weights", "momentum", "AdamW moments"


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank."""

    stage: int
    """Pipeline stage of the rank."""
    parameters: int
    gradients: int
    """fp32 sums, whatever the precision."""
    optimizer: dict[str, int] = field(default_factory=dict)
    """By kind of state, fp32 all: master weights, momentum, AdamW moments."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + sum(self.optimizer.values())


def stage_tensors(shape: ModelShape, layout: Layout) -> list[list[TensorSpec]]:
    """The tensors of each pipeline stage.

    Embedding and positions are on the first stage, final norm and head on the last; a tied head
    on another stage than the embedding is a copy of it.
    """
    stages: list[list[TensorSpec]] = [[] for _ in range(layout.pipeline)]
    stage_of = {
        number: stage
        for stage, chunks in enumerate(layout.chunk_layers(shape.num_layers))
        for numbers in chunks
        for number in numbers
    }
    for name, spec in tensor_table(shape).items():
        number = layer_number(name)
        if number is not None:
            stages[stage_of[number]].append(spec)
        elif spec.role in ("embedding", "position"):
            stages[0].append(spec)
            if spec.role == "embedding" and shape.tie_embeddings and layout.pipeline > 1:
                stages[-1].append(spec)
        else:
            stages[-1].append(spec)
    return stages


def _uses_adamw(spec: TensorSpec, optim: OptimSection) -> bool:
    return optim.name == "adamw" or (spec.role in _EMBEDDINGS and optim.embeddings == "adamw")


def _rank_memory(
    stage: int, specs: list[TensorSpec], config: RunConfig, layout: Layout
) -> RankMemory:
    optim, precision = config.optim, config.train.precision
    counts = [
        (spec, spec.numel // (layout.tensor if spec.tp_axis is not None else 1)) for spec in specs
    ]
    held = sum(count for _, count in counts)
    adamw = sum(count for spec, count in counts if _uses_adamw(spec, optim))
    zero, deepspeed = layout.zero_stage, layout.engine == "deepspeed"
    shards = layout.data if divides_state(optim, layout) else 1
    state = {
        # an fp32 model is its own master; DeepSpeed's partitions are copies all the same
        MASTER: held if precision == "bf16" or (deepspeed and zero >= 1) else 0,
        MOMENTUM: held - adamw,
        MOMENTS: 2 * adamw,
    }
    sizes = {kind: -(-count // shards) * _FP32_BYTES for kind, count in state.items()}
    weights = -(-held // layout.data) if deepspeed and zero == 3 else held
    gradients = -(-held // layout.data) if deepspeed and zero >= 2 else held
    return RankMemory(
        stage=stage,
        parameters=weights * _BYTES[precision],
        gradients=gradients * _FP32_BYTES,
        optimizer={kind: size for kind, size in sizes.items() if size},
    )


def divides_state(optim: OptimSection, layout: Layout) -> bool:
    """Whether optimizer state is divided over data-parallel ranks. Megatron-core's distributed
    optimizer divides AdamW's; Muon-NSGD, AdamW embeddings included, has its own on every rank
    there. DeepSpeed's ZeRO divides everything."""
    return layout.zero_stage >= 1 and (optim.name == "adamw" or layout.engine == "deepspeed")


def largest_rank(shape: ModelShape, config: RunConfig, layout: Layout) -> RankMemory:
    """Memory of the rank that holds most. Ranks of one stage hold the same amount."""
    stages = enumerate(stage_tensors(shape, layout))
    return max(
        (_rank_memory(stage, specs, config, layout) for stage, specs in stages),
        key=lambda memory: memory.total,
    )
