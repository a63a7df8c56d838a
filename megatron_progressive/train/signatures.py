"""The failure signatures that a run names by itself, with their likely cause."""

from __future__ import annotations

import math

from megatron_progressive.config import RunConfig
from megatron_progressive.expansion.hook import ExpansionEvent
from megatron_progressive.optim.schedule import decay_steps

SPIKE = 2.0
"""A loss after the expansion that is above this many times the loss before it counts as a
failure."""


def after_expansion(config: RunConfig, step: int, event: ExpansionEvent) -> str | None:
    """The warning that an expansion calls for; None for the usual spike, which passes."""
    if not math.isfinite(event.loss_after):
        return f"loss is {event.loss_after} after the expansion; likely cause: unstable new layers"
    if event.loss_after <= SPIKE * event.loss_before:
        return None
    in_decay = decay_steps(config) and step >= config.train.steps - decay_steps(config)
    cause = "the expansion is in the decay phase" if in_decay else f"init {event.init}"
    return (
        f"loss spike at the expansion: {event.loss_before:.3f} to {event.loss_after:.3f}, more "
        f"than {SPIKE:g}x; likely cause: {cause}"
    )


def after_step(loss: float, grad_norm: float) -> str | None:
    """Why training cannot go on after a step; None where it can."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return None
    return (
        f"loss {loss}, gradient norm {grad_norm}: training diverged; likely cause: learning rate "
        "too high, or random layers inserted at the top"
    )


def after_validation(loss: float) -> str | None:
    """Why the last validation gives no result; None where it gives one."""
    if math.isfinite(loss):
        return None
    return (
        f"validation loss {loss}: training diverged; likely cause: learning rate too high, or "
        "numbers beyond the precision's range"
    )
