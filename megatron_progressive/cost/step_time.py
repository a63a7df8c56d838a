"""Seconds of one training step on a cluster, by a simple model that serves to rank layouts.

A step takes, one after another:

- the products of the slowest pipeline stage (:mod:`.flops`: head and prediction on the last), at
  the assumed utilisation of the peak: those of an even share of the model, what the stage has
  beyond that, and what its backward pass computes anew (``parallel.recompute``); and the pipeline's
  bubble, (P - 1) / (v m) of all that for m micro-batches in v chunks (Narayanan et al. 2021, arXiv
  2104.04473, section 2.2);
- Newton-Schulz: its FLOPs divided over all ranks, or those of the largest matrix if that is more
  (each matrix is one rank's);
- tensor parallelism: four all-reduces of the residual stream for each layer and micro-batch, and
  two for embedding and head; sequence parallelism sends as many bytes (Korthikanti et al. 2022,
  arXiv 2205.05198, section 4.2.2);
- experts: four all-to-alls of the routed tokens for each layer and micro-batch, at the network's
  speed for the share that leaves the node (:mod:`.all_to_all`, also for ``kernels.deepep: true``);
- what the backward pass computes anew needs two more all-reduces for a whole layer, and two more
  all-to-alls for its experts;
- context parallelism: the keys and values of a rank's part of the sequence go around all context
  ranks, once in the forward pass and twice, with their gradients, in the backward pass, of each
  layer and micro-batch (once more where attention is computed anew). In truth attention hides some
  of it;
- sending the residual stream from stage to stage and back, at the network's speed where stages are
  on other nodes;
- half of the reduce-scatter of fp32 gradients and the all-gather of weights: that the other half is
  hidden behind compute is an assumption.

The model leaves out the communication of prediction modules (their products are counted), kernels
that are slow because their sizes are small, the latency of collectives, uneven experts, input,
validation and saving.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_progressive.config import OptimSection, RunConfig
from megatron_progressive.cost import flops
from megatron_progressive.cost.all_to_all import all_to_all_seconds
from megatron_progressive.cost.cluster import Cluster
from megatron_progressive.cost.memory import BYTES, RankMemory, rank_memory
from megatron_progressive.cost.recompute import recomputed_flops, whole_layers
from megatron_progressive.engines.partitions import chunk_tensors
from megatron_progressive.models.base import MOE, TensorSpec, TransformerShape, layer_number
from megatron_progressive.optim.rules import rule_of
from megatron_progressive.runtime.layout import Layout

_EXPOSED = 0.5
"""The share of the data-parallel traffic that compute does not hide."""


@dataclass(frozen=True)
class Part:
    """One layer, or what comes before or behind the layers, as sums."""

    tensors: tuple[tuple[TensorSpec, int], ...]
    """One tensor of each kind that matters for memory, and the number of elements that all of its
    kind have."""
    flops: int
    """The FLOPs of one token's forward pass."""


@lru_cache(maxsize=64)
def parts(
    shape: TransformerShape, optim: OptimSection, pipelined: bool
) -> tuple[Part, list[Part], Part]:
    """The parts of a model: what comes before the layers, each layer, and what comes behind them.
    ``pipelined`` models have a copy of the embedding there; multi-token prediction and the final
    norm are there, too."""
    stages = chunk_tensors(shape, Layout(2, pipeline=2) if pipelined else Layout(1))
    members: dict[int, list[TensorSpec]] = {n: [] for n in range(-1, shape.num_layers + 1)}
    for stage, chunks in enumerate(stages):
        for tensor in (tensor for chunk in chunks for tensor in chunk):
            number = layer_number(tensor.name)
            if number is None:
                first = stage == 0 and tensor.spec.role in ("embedding", "position")
                number = -1 if first else shape.num_layers
            members[number].append(tensor.spec)
    head, *layers, tail = (_part(shape, optim, members[number]) for number in sorted(members))
    shallow = sum(part.flops for part in (*layers, tail))
    # the head's products and prediction's, whatever tensors they share
    rest = flops.forward_flops_per_token(shape) - shallow
    return head, layers, Part(tail.tensors, tail.flops + rest)


def _part(shape: TransformerShape, optim: OptimSection, specs: list[TensorSpec]) -> Part:
    kinds: dict[tuple[bool, bool, bool, str], TensorSpec] = {}
    sizes: Counter[tuple[bool, bool, bool, str]] = Counter()
    products = 0
    for spec in specs:
        rule = rule_of(spec, optim) if spec.trainable else ""
        key = (spec.expert is not None, spec.tp_axis is not None, spec.trainable, rule)
        kinds[key] = spec
        sizes[key] += spec.numel
        products += flops.linear_flops(spec, shape)
    qkv = any(spec.role in ("qkv", "kv_up") for spec in specs)
    products += flops.attention_flops(shape) if qkv else 0
    return Part(tuple((kinds[key], sizes[key]) for key in kinds), products)


def stage_parts(
    shape: TransformerShape, optim: OptimSection, layout: Layout
) -> Iterator[list[Part]]:
    """The parts of each pipeline stage."""
    head, layers, tail = parts(shape, optim, layout.pipeline > 1)
    for stage, chunks in enumerate(layout.chunk_layers(shape.num_layers)):
        found = [layers[number] for numbers in chunks for number in numbers]
        found += [head] if stage == 0 else []
        yield found + ([tail] if stage == layout.pipeline - 1 else [])


def stage_states(shape: TransformerShape, config: RunConfig, layout: Layout) -> list[RankMemory]:
    """The same as :func:`.memory.stage_memory` in a thousandth of the time. The final norm of a
    model with prediction counts for the last stage."""
    found = []
    for stage, members in enumerate(stage_parts(shape, config.optim, layout)):
        sized = [pair for part in members for pair in part.tensors]
        found.append(rank_memory(stage, sized, config, layout))
    return found


@dataclass(frozen=True)
class StepTime:
    """The seconds of one step, by what takes them."""

    compute: float
    """Of the model's products where all stages have equally many."""
    uneven: float
    """Of what the slowest stage has beyond those."""
    recompute: float
    """Of what the slowest stage computes anew."""
    bubble: float
    optimizer: float
    tensor: float
    context: float
    experts: float
    pipeline: float
    data: float

    @property
    def total(self) -> float:
        return (
            self.compute + self.uneven + self.recompute + self.bubble + self.optimizer
            + self.tensor + self.context + self.experts + self.pipeline + self.data
        )  # fmt: skip


def step_time(
    shape: TransformerShape, config: RunConfig, layout: Layout, cluster: Cluster, state: RankMemory
) -> StepTime:
    """The seconds of one step of ``shape``; ``state`` is the memory of the fullest rank."""
    train, moe = config.train, shape.moe
    width = BYTES[train.precision]
    tokens = train.micro_batch * shape.sequence_length / layout.context
    batches = train.global_batch // (train.micro_batch * layout.data)
    t, stages, chunks = layout.tensor, layout.pipeline, layout.virtual_pipeline
    chunked = layout.chunk_layers(shape.num_layers)
    products = [
        (3 * sum(part.flops for part in members), recomputed_flops(shape, layout, numbers))
        for members, numbers in zip(stage_parts(shape, config.optim, layout), chunked, strict=True)
    ]
    slowest, anew = max(products, key=sum)
    even = sum(stage for stage, _ in products) / stages
    a_flop = tokens * batches / t / cluster.flops_per_s
    newton = flops.optimizer_flops(shape, config.optim)
    largest = flops.largest_matrix_flops(shape, config.optim)
    stream = tokens * shape.hidden_size * width
    kinds = shape.layer_kinds()
    deepest = max(sum(len(numbers) for numbers in stage) for stage in chunked)
    whole = max(
        sum(anew for numbers in stage for _, anew in whole_layers(layout, numbers))
        for stage in chunked
    )
    reduced = 4 * deepest + 2 * whole + 2
    reduces = reduced * batches * 2 * (t - 1) / t * stream / cluster.bytes_per_s(t)
    again = deepest if "core_attn" in layout.recompute_modules else whole
    passed = tokens * _keys_and_values(shape) * width / t * (layout.context - 1)
    passed *= (3 * deepest + again) * batches / cluster.bytes_per_s(t * layout.context)
    moving = 0.0
    if moe is not None and MOE in kinds:
        deepep = config.kernels.deepep is True and layout.can_use_deepep
        seconds = all_to_all_seconds(moe, layout, cluster, stream / t, deepep=deepep)
        experts = min(deepest, kinds.count(MOE))
        again = experts if "moe" in layout.recompute_modules else min(whole, experts)
        moving = (4 * experts + 2 * again) * batches * seconds
    sent = 2 * stream * batches * chunks / cluster.bytes_per_s(layout.world) if stages > 1 else 0.0
    gathered = state.gradients + state.parameters
    data = _EXPOSED * gathered * (layout.replicas - 1) / layout.replicas
    return StepTime(
        compute=even * a_flop,
        uneven=(slowest - even) * a_flop,
        recompute=anew * a_flop,
        bubble=(slowest + anew) * a_flop * (stages - 1) / (chunks * batches),
        optimizer=max(newton / layout.world, largest) / cluster.flops_per_s,
        tensor=reduces,
        context=passed,
        experts=moving,
        pipeline=sent,
        data=data / cluster.bytes_per_s(t * layout.replicas),
    )


def _keys_and_values(shape: TransformerShape) -> int:
    """The elements of one token's keys and values in a layer."""
    if shape.mla is not None:
        return shape.num_attention_heads * (shape.mla.qk_head_dim + shape.mla.v_head_dim)
    return 2 * shape.num_query_groups * shape.head_dim
