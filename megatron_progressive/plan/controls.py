"""The two runs that a progressive run is judged against, as configurations and as commands.

*Fixed-size* has the target depth from the first step, and as many steps. The *short control* has
the target depth from scratch with a complete schedule of its own, and ends at the progressive run's
total FLOPs; growing pays only where it ends below this control, over several seeds.
"""

from __future__ import annotations

import shlex
from dataclasses import replace

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.cost.flops import step_flops, total_flops
from megatron_progressive.models import model_shape

FIXED_SUFFIX, SHORT_SUFFIX = "_fixed", "_short"


def _at_target(config: RunConfig, suffix: str) -> RunConfig:
    if not config.expansion:
        raise ConfigError("expansion: got none; accepted: a run that expands, to control for")
    return replace(
        config,
        run=replace(config.run, name=config.run.name + suffix),
        model=replace(config.model, num_layers=config.expansion[-1].to_layers),
        parallel=config.parallel_after(len(config.expansion)),
        expansion=[],
    )


def fixed_size(config: RunConfig) -> RunConfig:
    """The fixed-size control, which has the target depth and the last layout from the first step.

    Raises:
        ConfigError: ``config`` has no expansion.
    """
    return _at_target(config, FIXED_SUFFIX)


def short_control(config: RunConfig) -> RunConfig:
    """The control of equal FLOPs: :func:`fixed_size` for as many steps as the progressive run's
    total FLOPs allow. The schedule's fractions are of these steps, so the schedule is complete.

    Raises:
        ConfigError: ``config`` has no expansion, or costs less than one step of the target (which
            :func:`.preflight.check_run` excludes: a step at full depth always follows τ).
    """
    control = _at_target(config, SHORT_SUFFIX)
    budget, one_step = total_flops(config), step_flops(model_shape(control), control)
    if budget < one_step:
        raise ConfigError(
            f"train.steps: got {config.train.steps}, whose {budget:.3g} FLOPs do not pay for "
            f"one step of the target ({one_step:.3g}); accepted: more steps"
        )
    return replace(control, train=replace(control.train, steps=budget // one_step, stop_after=None))


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
    for key, value in vars(control.parallel).items():
        if value != getattr(config.parallel, key):
            words.append(f"parallel.{key}={value}")
    return words


def control_command(config_path: str, config: RunConfig, control: RunConfig) -> str:
    """The shell command that trains a control of the run that ``config_path`` configures."""
    return shlex.join(["mprog", "train", config_path, *control_words(config, control)])
