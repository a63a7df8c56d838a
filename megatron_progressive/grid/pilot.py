"""The pilot of a grid: one mixing time, measured at one size, gives the τ of cells of every size.

The mixing time in *tokens* is carried over: under a constant learning rate it depends neither on τ
nor on the source's depth (arXiv 2511.04981), and the paper uses one for all sizes. A study that
measures a single one cannot tell whether that holds for its own sizes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_progressive.compare.mixing import MixingTime, propose
from megatron_progressive.compare.pilot import (
    Pilot,
    headline,
    measure,
    plan_pilot,
    recorded,
    reservation,
)
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.config.values import converted, shown
from megatron_progressive.cost.flops import step_tokens
from megatron_progressive.data import DataIdentity
from megatron_progressive.grid.cells import (
    ONE_LAYER,
    PILOT,
    ZERO_LAYER,
    Cell,
    SizeCells,
)
from megatron_progressive.models import model_shape, parameter_count
from megatron_progressive.optim.schedule import decay_steps
from megatron_progressive.plan.preflight import check_run, smallest_world

KEYS = ("size", "steps", "at", "source")
SOURCES = (ZERO_LAYER, ONE_LAYER)

ASSUMED = 0.8
"""The τ of cells that wait for the pilot, as a share of the last stable step; it serves to price
these cells alone."""

WAITS = "waits for the pilot"


@dataclass(frozen=True)
class GridPilot:
    """The pilot that a grid asks for."""

    size: str
    source: str
    config: RunConfig
    """The configuration of the progressive run for which the pilot measures."""
    plan: Pilot
    trained_on: DataIdentity | None = None
    """What the study is trained on; None where that is not settled yet."""

    @property
    def cells(self) -> list[Cell]:
        """The two runs of the pilot, which are run, locked and tried again as cells are."""
        return [
            Cell(
                f"{PILOT}-{arm.run.name.rsplit('_', 1)[-1]}", self.size, PILOT, arm.run.seed, arm,
                trained_on=self.trained_on,
            )
            for arm, _ in self.plan.files
        ]  # fmt: skip

    def mixing(self) -> MixingTime | None:
        """The mixing time that the pilot measured; None where it has not run to its end."""
        return recorded(self.plan, self.trained_on)

    def measure(self) -> MixingTime:
        """Measure the mixing time from the two finished runs, and write it as ``pilot.json``."""
        return measure(self.config, self.plan)[0]

    def finding(self) -> str:
        """What the pilot measured, in one line; empty where it has not measured yet."""
        mixing = self.mixing()
        if mixing is None:
            return ""
        doubt = reservation(mixing)
        return f"{headline(mixing)} ({self.size}, {self.source})" + f"; but {doubt}" * bool(doubt)

    def tau_of(self, config: RunConfig) -> tuple[int, str]:
        """The τ of a configuration in steps, and why it is not known, in which case the τ is an
        assumed one.

        Raises:
            ConfigError: the schedule is one whose mixing time depends on τ.
        """
        if config.schedule.name != "wsd":
            raise ConfigError(
                f"tau: got {PILOT} with schedule.name {config.schedule.name}; accepted: fractions "
                f"or steps, or schedule wsd"
            )
        assumed = max(1, round(ASSUMED * (config.train.steps - decay_steps(config))))
        mixing = self.mixing()
        if mixing is None:
            return assumed, WAITS
        proposal = propose(config, mixing, step_tokens(model_shape(config), config))
        if proposal is None:
            return assumed, f"the pilot: {_lower(headline(mixing))}"
        if proposal.tau is None:
            return assumed, (
                f"the pilot: {_lower(headline(mixing))}, but the stable phase ends at step "
                f"{proposal.last_stable:,}: no τ after the warmup"
            )
        return proposal.tau, ""


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def grid_pilot(
    values: dict[str, Any], bases: Sequence[SizeCells], arms: list[str], init: str, folder: Path
) -> GridPilot:
    """The pilot of a grid.

    Args:
        values: the grid's ``pilot``, with ``size`` (default: the size with the fewest parameters),
            ``steps`` and ``at`` (as in ``mprog pilot --steps`` and ``--at``) and ``source``
            (default: the first of ``arms`` that grows from zero layers or one layer).
        bases: the cells of each size, once.
        init: the initialisation for a one-layer source.
        folder: the folder of the study.

    Raises:
        ConfigError: there is no such size or source, or the pilot cannot run.
    """
    names = [base.name for base in bases]
    smallest = min(bases, key=lambda b: parameter_count(model_shape(b.config, b.layers)))
    size = converted("pilot.size", values.get("size", smallest.name), str)
    if size not in names:
        raise ConfigError(f"pilot.size: got {size!r}; accepted: {', '.join(names)}")
    sources = [arm for arm in arms if arm in SOURCES]
    source = values.get("source", sources[0] if sources else None)
    if source not in SOURCES:
        got = "none among the arms" if source is None else shown(source)
        raise ConfigError(f"pilot.source: got {got}; accepted: {', '.join(SOURCES)}")
    try:
        steps, at = (converted(key, values.get(key), float, True) for key in ("steps", "at"))
    except ConfigError as error:
        said = str(error).split("; accepted")[0]
        raise ConfigError(f"pilot.{said}; accepted: a fraction below 1, or a step") from None
    base = bases[names.index(size)]
    config = base.grown(source, ASSUMED, init)
    try:
        planned = plan_pilot(config, steps, at)
        endings = [arm.run.name.removeprefix(config.run.name) for arm, _ in planned.files]
        name = f"{PILOT}-{size}-{source}-s{config.run.seed}"
        name = base.choose_name(name, planned.progressive, endings)
        config = replace(config, run=replace(config.run, name=name))
        plan = replace(plan_pilot(config, steps, at), folder=folder / PILOT)
        for arm, _ in plan.files:
            check_run(arm, smallest_world(arm))
    except ConfigError as error:
        said = re.sub(r"--(steps|at)\b", r"pilot.\1", str(error))
        raise ConfigError(f"pilot: {said}") from None
    return GridPilot(size, source, config, plan, base.trained_on(config))
