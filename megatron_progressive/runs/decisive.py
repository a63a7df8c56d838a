"""Which keys of a configuration decide a run's numbers, and which only how it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_progressive.config import RunConfig
from megatron_progressive.models import model_shape

# How a run is laid out and watched: never what is computed, but for rounding.
_FREE = {"run.dir", "run.extend", "train.stop_after", "train.save_every", "train.keep_checkpoints",
         "train.log_every", "train.trackers", "optim.ns_kernel_from",
         "train.eval_tasks", "train.eval_tasks_every", "train.eval_tasks_limit",
         "train.eval_tasks_device"}  # fmt: skip
_PLACE = re.compile(r"data\.(.+\.)?prepared")  # also of a part of a mixture, or a validation set
_MICRO_BATCH = "train.micro_batch"


def decisive(config: RunConfig) -> dict[str, Any]:
    """Every key that decides the run's numbers, by its full name, with its value.

    ``train.micro_batch`` is one of them where the model says so
    (:attr:`.ModelShape.micro_batch_decides`).

    Raises:
        ConfigError: there is no such model (see :func:`.models.model_shape`).
    """
    free = _FREE if model_shape(config).micro_batch_decides else _FREE | {_MICRO_BATCH}
    return dict(_decisive(asdict(config), free))


def _decisive(values: Any, free: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        name = f"{prefix}.{key}" if prefix else str(key)
        if name in ("parallel", "kernels") or name.endswith(".parallel") or name in free:
            continue
        if _PLACE.fullmatch(name):
            continue
        if isinstance(value, dict) or (isinstance(value, list) and value):
            yield from _decisive(value, free, name)
        else:
            yield name, value
