"""Learning-rate schedules, as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from megatron_progressive.config import RunConfig


def warmup_steps(config: RunConfig) -> int:
    """The number of steps of linear warmup."""
    return round(config.schedule.warmup * config.train.steps)


def decay_steps(config: RunConfig) -> int:
    """The number of steps of the final decay, which only ``wsd`` has; 0 for the other schedules."""
    return round(config.schedule.decay * config.train.steps) if config.schedule.name == "wsd" else 0


def last_stable_step(config: RunConfig) -> int:
    """The last step before the final decay of ``wsd``: its last one at the peak learning rate, and
    at the earliest the end of the warmup. 0 for the other schedules, which fall all along."""
    return config.train.steps - decay_steps(config) if config.schedule.name == "wsd" else 0


def rewarm_steps(config: RunConfig) -> int:
    """The number of steps after an expansion in which the learning rate climbs again."""
    return round((config.schedule.rewarm or 0.0) * config.train.steps)


def rewarmed(config: RunConfig, step: int) -> float:
    """The share of the schedule's learning rate that is used at ``step``, which counts from 1, by
    what re-warms: the part of an expansion's climb that is done, and 1 outside of any.

    The climb is linear and ends at its last step, as warmup does: of R steps after an expansion the
    k-th has from + (1 - from) k / R. Another expansion starts it anew.
    """
    length, start = rewarm_steps(config), config.schedule.rewarm_from or 0.0
    before = [tau for tau in config.expansion_steps() if tau < step]
    if not before or step - before[-1] >= length:
        return 1.0
    return start + (1 - start) * (step - before[-1]) / length


def rewarms_new_layers(config: RunConfig) -> bool:
    """Whether new layers re-warm alone, at a learning rate of their own."""
    return rewarm_steps(config) > 0 and config.schedule.rewarm_layers == "new"


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate of ``step``, which counts from 1, of all tensors but those of new layers
    where these re-warm alone (:func:`rewarms_new_layers`): theirs is :func:`rewarmed` of it.

    Warmup is linear and reaches the peak at its last step. ``wsd`` then holds the peak and falls
    linearly over the last ``decay`` steps; ``cosine`` and ``linear`` fall from the end of the
    warmup. All would reach zero one step after the last, so no step is without effect.
    """
    share = 1.0 if rewarms_new_layers(config) else rewarmed(config, step)
    return share * _scheduled(config, step)


def _scheduled(config: RunConfig, step: int) -> float:
    total, warmup = config.train.steps, warmup_steps(config)
    if step <= warmup:
        return config.optim.lr * step / warmup
    if config.schedule.name == "wsd":
        decay = decay_steps(config)
        return config.optim.lr * min(1.0, (total + 1 - step) / (decay + 1) if decay else 1.0)
    done = (step - warmup) / (total + 1 - warmup)
    if config.schedule.name == "cosine":
        return config.optim.lr * 0.5 * (1 + math.cos(math.pi * done))
    return config.optim.lr * (1 - done)
