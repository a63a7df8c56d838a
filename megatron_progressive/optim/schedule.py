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


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate of ``step``, which counts from 1.

    Warmup is linear and reaches the peak at its last step. ``wsd`` then holds the peak and falls
    linearly over the last ``decay`` steps; ``cosine`` and ``linear`` fall from the end of the
    warmup. All would reach zero one step after the last, so no step is without effect.
    """
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
