"""Which rank does what: sizes of the parallel groups and the layers of each pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_progressive.config import ConfigError, ParallelSection

RANK_ORDER = "tp-cp-ep-dp-pp"
"""Which ranks are neighbours, in Megatron-core's words, the first parallelism innermost: a
tensor-parallel group has the nearest ranks, and an expert-parallel one the next, so that both lie
in one node where they are no larger, and on the fewest nodes where they are."""

_NVLINK_PEERS = 8
"""The GPUs of a node for DeepEP (its ``NUM_MAX_NVL_PEERS``)."""


@dataclass(frozen=True)
class Layout:
    """The sizes of the parallel groups of one engine over ``world`` ranks."""

    world: int
    engine: str = "megatron"
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Number of model chunks in each pipeline stage."""
    context: int = 1
    """Number of ranks over which each sequence is divided (context parallelism)."""
    expert: int = 1
    """Number of ranks over which experts are divided; it divides :attr:`replicas`."""
    expert_tensor: int = 0
    """Number of tensor-parallel ranks of an expert; 0 stands for as many as ``tensor``."""
    zero_stage: int = 1
    sequence: bool | None = None
    """Whether tensor-parallel ranks divide the sequence outside of what they divide anyway; None
    stands for wherever they can."""
    recompute: str = "none"
    """What the backward pass computes anew: ``none``, ``selective`` or ``full``."""
    recompute_modules: tuple[str, ...] = ()
    """The parts of a layer that ``selective`` computes anew."""
    recompute_layers: int | None = None
    """How many layers of each model chunk ``full`` computes anew; None stands for all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_tensor", self.expert_tensor or self.tensor)

    @property
    def data(self) -> int:
        """The number of data-parallel ranks, each of which has samples of its own."""
        return self.replicas // self.context

    @property
    def replicas(self) -> int:
        """The number of ranks that hold the same part of the model: data x context. Gradients are
        summed over them, and the optimizer state is divided over them."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def expert_data(self) -> int:
        """The number of ranks that hold the same part of the same experts."""
        return self.world // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def separate_experts(self) -> bool:
        """Whether experts have parallel groups of their own."""
        return self.expert > 1 or self.expert_tensor != self.tensor

    @property
    def distributed_optimizer(self) -> bool:
        """Whether Megatron-core's distributed optimizer is in use, for whatever rule of updates: it
        divides the optimizer state, reduces gradients into shares and gathers weights from
        shares."""
        return self.engine == "megatron" and self.zero_stage >= 1

    @property
    def can_use_deepep(self) -> bool:
        """Whether experts lie on several ranks, of one node or of whole ones, as DeepEP has it."""
        ranks = self.expert * self.expert_tensor
        return ranks > 1 and (ranks <= _NVLINK_PEERS or ranks % _NVLINK_PEERS == 0)

    def divides_sequence(self, sequence_length: int) -> bool:
        """Whether tensor-parallel ranks divide a sequence of this length (sequence parallelism)."""
        wanted = self.sequence is not False and self.tensor > 1
        return wanted and sequence_length % (self.tensor * self.context) == 0

    def __str__(self) -> str:
        parts = [f"DP={self.data}"]
        parts += [f"TP={self.tensor}"] if self.tensor > 1 else []
        parts += [f"PP={self.pipeline}"] if self.pipeline > 1 else []
        parts += [f"VPP={self.virtual_pipeline}"] if self.virtual_pipeline > 1 else []
        parts += [f"CP={self.context}"] if self.context > 1 else []
        parts += [f"EP={self.expert}"] if self.expert > 1 else []
        parts += [f"ETP={self.expert_tensor}"] if self.expert_tensor != self.tensor else []
        if self.recompute == "selective":
            parts.append(f"recompute {', '.join(self.recompute_modules)}")
        elif self.recompute == "full":
            some = self.recompute_layers
            parts.append("recompute " + ("all" if some is None else f"{some} layers a chunk"))
        zero = f" (DeepSpeed, ZeRO stage {self.zero_stage})" if self.engine == "deepspeed" else ""
        return " x ".join(parts) + zero

    @property
    def virtual_stages(self) -> int:
        """The number of model chunks in the whole pipeline."""
        return self.pipeline * self.virtual_pipeline

    def chunk_layers(self, num_layers: int) -> list[list[range]]:
        """The global layer numbers of each model chunk, as [pipeline stage][model chunk].

        Layers run through the virtual stages in order; chunk c of stage s is virtual stage c *
        pipeline + s. Virtual stages differ by at most one layer, and so do stages: see
        :meth:`_extra_layer_order`. With fewer layers than virtual stages the first stages get one
        layer each and the others none: a source of zero layers or one layer runs on any number of
        stages.
        """
        each, extra = divmod(num_layers, self.virtual_stages)
        # without a full round there is nothing to balance: the first virtual stages
        order = self._extra_layer_order() if each else list(range(self.virtual_stages))
        longer = set(order[:extra])
        chunks: list[list[range]] = [[] for _ in range(self.pipeline)]
        first = 0
        for virtual_stage in range(self.virtual_stages):
            last = first + each + (virtual_stage in longer)
            chunks[virtual_stage % self.pipeline].append(range(first, last))
            first = last
        return chunks

    def _extra_layer_order(self) -> list[int]:
        """The virtual stages in the order in which they take one layer more than the others.

        Each stage takes one in turn, so that stages stay balanced: first the stages between that of
        the embedding and that of the head, then the embedding's (a lookup, which costs memory), and
        last the head's (a matrix of vocabulary size, and the cross-entropy). These two stages take
        the layer in the chunk that is farthest from the embedding or the head.
        """
        stages = [*range(1, self.pipeline - 1), *sorted({0, self.pipeline - 1})]
        chunks = range(self.virtual_pipeline)
        return [
            (chunk if stage else self.virtual_pipeline - 1 - chunk) * self.pipeline + stage
            for chunk in chunks
            for stage in stages
        ]


def make_layout(parallel: ParallelSection, world: int) -> Layout:
    """The layout of ``parallel`` over ``world`` ranks.

    Raises:
        ConfigError: tensor x pipeline x context, or the product for the experts, does not divide
            the number of ranks.
    """
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world % ranks:
        context = f" x context {parallel.context}" if parallel.context > 1 else ""
        raise ConfigError(
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline}{context} = {ranks} "
            f"does not "
            f"divide the {world} rank{'s' if world > 1 else ''}; accepted: a divisor of {world}"
        )
    expert_tensor = parallel.expert_tensor or parallel.tensor
    ranks = expert_tensor * parallel.expert * parallel.pipeline
    if world % ranks:
        name = "expert_tensor" if parallel.expert_tensor else "tensor"
        others = world // parallel.pipeline // expert_tensor
        fix = f"a divisor of {others}" if others else f"less {name}"
        raise ConfigError(
            f"parallel.expert: got {parallel.expert}, with {name} {expert_tensor} and pipeline "
            f"{parallel.pipeline} for {world} rank{'s' if world > 1 else ''}; accepted: {fix}"
        )
    modules = sorted(set(parallel.recompute_modules))
    return Layout(
        world=world,
        engine=parallel.engine,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=expert_tensor,
        zero_stage=parallel.zero_stage,
        sequence=parallel.sequence,
        recompute=parallel.recompute,
        # what has no effect makes no other layout
        recompute_modules=tuple(modules) if parallel.recompute == "selective" else (),
        recompute_layers=parallel.recompute_layers if parallel.recompute == "full" else None,
    )
