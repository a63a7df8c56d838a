"""The runs that a progressive run is judged against, as configurations and as commands.

*Fixed-size* has the target depth from the first step, and as many steps. The *short control* has
the target depth from scratch with a complete schedule of its own, and ends at the progressive run's
total FLOPs. *Never grown* is the source depth with a complete schedule of its own, for as many
steps as those FLOPs pay for. Growing pays only where it ends below the last two, over several
seeds.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.cost.flops import step_flops, total_flops
from megatron_progressive.models import model_shape
from megatron_progressive.plan.shell_words import field_word

FIXED_SUFFIX, SHORT_SUFFIX, NEVER_SUFFIX = "_fixed", "_short", "_never_grown"


def _depths(config: RunConfig) -> list[int]:
    """Layers of each phase."""
    if not config.expansion:
        raise ConfigError("expansion: got none; accepted: a run that expands, to control for")
    return [model_shape(config).num_layers, *(e.to_layers for e in config.expansion)]


AFTER_EXPANSIONS = ("rewarm", "rewarm_from", "rewarm_layers")
"""The keys of ``schedule`` that say what happens after an expansion. A run without one has none of
them, or equal runs would have different configurations."""


_NOTHING: dict[str, Any] = dict.fromkeys(AFTER_EXPANSIONS)


def _from_scratch(config: RunConfig, phase: int, suffix: str) -> RunConfig:
    """The model and the layout of one phase from the first step on."""
    return replace(
        config,
        run=replace(config.run, name=config.run.name + suffix),
        model=replace(config.model, num_layers=_depths(config)[phase]),
        parallel=config.parallel_after(phase),
        schedule=replace(config.schedule, **_NOTHING),
        expansion=[],
    )


def _of_equal_flops(control: RunConfig, config: RunConfig, model: str) -> RunConfig:
    """``control`` for as many steps as the total FLOPs of ``config`` pay for. The schedule's
    fractions are of its own steps, so it is complete."""
    budget, one_step = total_flops(config), step_flops(model_shape(control), control)
    if budget < one_step:
        raise ConfigError(
            f"train.steps: got {config.train.steps}, whose {budget:.3g} FLOPs do not pay for "
            f"one step of the {model} ({one_step:.3g}); accepted: more steps"
        )
    return replace(control, train=replace(control.train, steps=budget // one_step, stop_after=None))


def fixed_size(config: RunConfig) -> RunConfig:
    """The fixed-size control, which has the target depth and the last layout from the first step.

    Raises:
        ConfigError: ``config`` has no expansion.
    """
    return _from_scratch(config, len(_depths(config)) - 1, FIXED_SUFFIX)


def short_control(config: RunConfig) -> RunConfig:
    """The equal-FLOPs control: :func:`fixed_size` for as many steps as the progressive run's
    total FLOPs allow, with a complete schedule.

    Raises:
        ConfigError: ``config`` has no expansion, or costs less than one step of the target (which
            :func:`.preflight.check_run` excludes: a step at full depth always follows τ).
    """
    target = _from_scratch(config, len(_depths(config)) - 1, SHORT_SUFFIX)
    return _of_equal_flops(target, config, "target")


def depths_before(config: RunConfig) -> list[int]:
    """The depths that a run has before its full one, in their order, each once.

    Raises:
        ConfigError: ``config`` has no expansion.
    """
    *early, full = _depths(config)
    return [depth for depth in dict.fromkeys(early) if depth != full]


def never_grown(config: RunConfig) -> list[RunConfig]:
    """The controls that never grow: one for each of :func:`depths_before`, on the layout that the
    run has there first, for as many steps as its total FLOPs allow, with a complete schedule. Of
    a run in stages the best of them counts.

    Raises:
        ConfigError: ``config`` has no expansion.
    """
    depths = _depths(config)
    return [
        _of_equal_flops(
            _from_scratch(config, depths.index(depth), f"{NEVER_SUFFIX}_{depth}"), config, "source"
        )
        for depth in depths_before(config)
    ]


def all_controls(config: RunConfig) -> list[RunConfig]:
    """Fixed-size, the short control, and those that never grow.

    Raises:
        ConfigError: as :func:`short_control`.
    """
    return [fixed_size(config), short_control(config), *never_grown(config)]


def control_words(config: RunConfig, control: RunConfig) -> list[str]:
    """The ``key=value`` words that turn ``config`` into one of its controls."""
    words = [
        f"run.name={control.run.name}",
        f"model.num_layers={control.model.num_layers}",
        "expansion=[]",
    ]
    if control.train.steps != config.train.steps:
        words.append(f"train.steps={control.train.steps}")
    if control.train.stop_after != config.train.stop_after:
        words.append("train.stop_after=null")
    for key in AFTER_EXPANSIONS:
        if getattr(config.schedule, key) is not None:
            words.append(f"schedule.{key}=null")
    for key, value in vars(control.parallel).items():
        if value != getattr(config.parallel, key):
            words.append(field_word(f"parallel.{key}", value))
    return words


def control_command(config_path: str, config: RunConfig, control: RunConfig) -> str:
    """The shell command that trains a control of the run that ``config_path`` configures."""
    return shlex.join(["mprog", "train", config_path, *control_words(config, control)])
