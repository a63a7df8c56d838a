"""The regime of a run: what decides whether somebody else's finding says anything of it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_progressive.config import RunConfig
from megatron_progressive.cost.flops import step_tokens
from megatron_progressive.models import active_parameter_count, model_shape
from megatron_progressive.models.base import MOE


@dataclass(frozen=True)
class Growth:
    """How a run grows."""

    depths: list[int]
    """The layers of each phase, the full depth last."""
    taus: list[float]
    """After which share of the steps it grows, each."""
    init: str = "copying"
    """How new layers begin, as ``expansion.init`` has it."""
    insert: str = "bottom"
    """Where new layers go, as ``expansion.insert`` has it."""

    @property
    def factor(self) -> float | None:
        """The full depth over the first one; None from no layers."""
        return self.depths[-1] / self.depths[0] if self.depths[0] else None


@dataclass(frozen=True)
class Regime:
    """A model, how much it is trained, and how it grows."""

    family: str
    experts: bool
    """Whether layers have experts."""
    width: int | None
    params: float
    """Parameters of the full depth that one token is computed with."""
    tokens_per_param: float | None
    """Training tokens for each of these parameters; of a run that grows all of its tokens. None
    where the source does not say."""
    optimizer: str | None
    """``muon`` or ``adamw``; None where the source does not say."""
    schedule: str | None
    growth: Growth | None
    """None of a run that does not grow, or of a source that tells of no one growth."""


def regime_of(config: RunConfig) -> Regime:
    """The regime of a configured run."""
    last = config.expansion[-1] if config.expansion else None
    shape = model_shape(config, last.to_layers if last else None)
    params = active_parameter_count(shape)
    growth = None
    if last is not None:
        depths = [model_shape(config).num_layers, *(one.to_layers for one in config.expansion)]
        taus = [round(step / config.train.steps, 4) for step in config.expansion_steps()]
        growth = Growth(depths, taus, last.init, last.insert)
    return Regime(
        family=config.model.family,
        experts=any(kind == MOE for kinds in shape.stacks().values() for kind in kinds),
        width=getattr(shape, "hidden_size", None),
        params=params,
        tokens_per_param=config.train.steps * step_tokens(shape, config) / params,
        optimizer=config.optim.name.partition("_")[0],
        schedule=config.schedule.name,
        growth=growth,
    )


def growth_text(growth: Growth) -> str:
    """``0 → 24 layers at 0.8 T, random, bottom insert``."""
    depths = " → ".join(map(str, growth.depths))
    taus = " and ".join(f"{tau:.3g}" for tau in growth.taus)
    where = f", {growth.insert} insert" if growth.depths[0] else ""
    return f"{depths} layers at {taus} T, {growth.init}{where}"
