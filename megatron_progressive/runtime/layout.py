"""Which rank does what: sizes of the parallel groups and the layers of each pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_progressive.config import ConfigError, ParallelSection


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups of one engine, over ``world`` ranks."""

    world: int
    engine: str = "megatron"
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    zero_stage: int = 1

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.world // (self.tensor * self.pipeline)

    def __str__(self) -> str:
        parts = [f"DP={self.data}"]
        parts += [f"TP={self.tensor}"] if self.tensor > 1 else []
        parts += [f"PP={self.pipeline}"] if self.pipeline > 1 else []
        return " x ".join(parts)

    def stage_layers(self, num_layers: int) -> list[range]:
        """Global layer numbers of each pipeline stage.

        With fewer layers than stages the first stages get one each and the others none: a
        zero- or one-layer source runs on any number of stages.
        """
        if num_layers < self.pipeline:
            return [range(min(s, num_layers), min(s + 1, num_layers)) for s in range(self.pipeline)]
        each = num_layers // self.pipeline
        return [range(s * each, (s + 1) * each) for s in range(self.pipeline)]


def make_layout(parallel: ParallelSection, world: int) -> Layout:
    """The layout of ``parallel`` over ``world`` ranks.

    Raises:
        ConfigError: tensor x pipeline does not divide the ranks.
    """
    ranks = parallel.tensor * parallel.pipeline
    if world % ranks:
        raise ConfigError(
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} = {ranks} does not "
            f"divide the {world} rank{'s' if world > 1 else ''}; accepted: a divisor of {world}"
        )
    return Layout(
        world=world,
        engine=parallel.engine,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        expert=parallel.expert,
        zero_stage=parallel.zero_stage,
    )
