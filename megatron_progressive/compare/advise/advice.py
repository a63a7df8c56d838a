"""Whether growing is expected to pay for a plan, by what is known of runs like it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_progressive.compare.advise.distance import NEAR, REACH, alike, distance, parts
from megatron_progressive.compare.advise.evidence import Evidence
from megatron_progressive.compare.advise.proposal import pilot_grid
from megatron_progressive.compare.advise.regime import Regime, regime_of
from megatron_progressive.compare.arms import EQUAL_FLOPS
from megatron_progressive.compare.decision import BELOW, DOES_NOT_PAY, NOT_BELOW, OPEN, PAYS
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.cost.flops import total_flops
from megatron_progressive.cost.headroom import headroom_percent
from megatron_progressive.models import model_shape
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.plan import preflight
from megatron_progressive.plan.controls import fixed_size

UNKNOWN = "unknown"
"""The answer where no finding is near enough to count."""
_SHOWN = 5
"""The most findings that are shown beside those that count."""
_TOLD = 0.05
"""Octaves from which a difference is told."""


@dataclass(frozen=True)
class Weighed:
    """A finding and its distance from the plan."""

    evidence: Evidence
    distance: float
    """In octaves (:mod:`.distance`)."""
    apart: list[str]
    """What separates the two, the most important first."""
    alike: bool
    """Whether it grows as the plan does."""

    @property
    def counts(self) -> bool:
        """Whether it counts for the answer."""
        return self.alike and self.distance <= NEAR and self.evidence.measured


@dataclass(frozen=True)
class Advice:
    """The answer for one plan."""

    name: str
    """The name of the run."""
    regime: Regime
    flops_share: float | None
    """Its FLOPs over those of fixed-size training; None where it does not grow."""
    headroom_percent: float | None
    """What growing can win at all (:mod:`.cost.headroom`), in %; None where nothing is saved."""
    answer: str
    """``pays``, ``does not pay``, ``open``, or ``unknown`` where nothing near enough is known."""
    controls: dict[str, str]
    """The same against each control alone: ``below``, ``not below``, ``open`` or ``unknown``."""
    basis: list[Weighed]
    """The findings that the answer rests on."""
    others: list[Weighed]
    """The nearest of the others."""
    best: Weighed | None
    """The growth that stands best against its controls within reach; None without any."""
    studies: list[str]
    """The folders of the user's studies that were read."""
    pilot: str | None
    """A grid that would tell, as YAML; None where the answer is known."""


def advise(config: RunConfig, evidence: Iterable[Evidence], studies: Sequence[str] = ()) -> Advice:
    """Weigh what is known for a plan.

    A finding counts where it is near and grows alike. Of those that count, runs decided over
    several seeds decide the answer, where they do not contradict each other; otherwise it is open.

    Args:
        config: of a language model, which grows or is to.
        evidence: the findings, of which the order does not matter.

    Raises:
        ConfigError: it is no language model, or the plan cannot run.
    """
    full = config.expansion[-1].to_layers if config.expansion else None
    if not isinstance(model_shape(config, full), TransformerShape):
        raise ConfigError(
            f"model.family: got {config.model.family}; accepted: a language model (of others no "
            f"comparison with controls of equal FLOPs is known)"
        )
    preflight.check_run(config, preflight.smallest_world(config))
    regime = regime_of(config)
    weighed = [_weighed(regime, one) for one in evidence]
    weighed.sort(key=lambda one: (one.distance, not one.alike, one.evidence.name))
    basis = [one for one in weighed if one.counts]
    others = [one for one in weighed if not one.counts]
    share = total_flops(config) / total_flops(fixed_size(config)) if config.expansion else None
    room = None
    if share is not None and share < 1:
        tokens = (regime.tokens_per_param or 0.0) * regime.params
        room = headroom_percent(regime.params, tokens, share)
    answer = _answer([one.evidence.outcome for one in basis], PAYS, DOES_NOT_PAY)
    return Advice(
        name=config.run.name,
        regime=regime,
        flops_share=share,
        headroom_percent=room,
        answer=answer,
        controls={
            control.name: _answer(_outcomes(basis, control.name), BELOW, NOT_BELOW)
            for control in EQUAL_FLOPS
        },
        basis=basis,
        others=others[:_SHOWN],
        best=_best(weighed),
        studies=list(studies),
        pilot=None if answer in (PAYS, DOES_NOT_PAY) else pilot_grid(config, regime),
    )


def _weighed(regime: Regime, one: Evidence) -> Weighed:
    apart = [text for octaves, text in parts(regime, one.regime) if octaves >= _TOLD]
    return Weighed(
        one, distance(regime, one.regime), apart, alike(regime.growth, one.regime.growth)
    )


def _answer(outcomes: Sequence[str], better: str, worse: str) -> str:
    """What several findings say together."""
    if not outcomes:
        return UNKNOWN
    decided = {outcome for outcome in outcomes if outcome in (better, worse)}
    return decided.pop() if len(decided) == 1 else OPEN


def _outcomes(basis: Sequence[Weighed], control: str) -> list[str]:
    return [
        one.outcome
        for weighed in basis
        for one in weighed.evidence.controls
        if one.control == control and one.mean is not None
    ]


def _best(weighed: Sequence[Weighed]) -> Weighed | None:
    """Within reach, growth that pays before growth that may; then growth that was compared with
    more controls; then by the difference to the control that it stands worst against. Growth that
    does not pay, or that ended above a control, is no advice."""
    ranked = []
    for index, one in enumerate(weighed):
        means = [c.mean for c in one.evidence.controls if c.mean is not None]
        good = means and max(means) < 0 and one.evidence.outcome != DOES_NOT_PAY
        if good and one.distance <= REACH and one.evidence.regime.growth is not None:
            pays = one.evidence.outcome == PAYS
            ranked.append(((not pays, -len(means), max(means), index), one))
    return min(ranked, key=lambda entry: entry[0])[1] if ranked else None
