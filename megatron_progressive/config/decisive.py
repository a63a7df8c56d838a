"""Which keys of a configuration decide a run's numbers, and which only how it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_progressive.config.schema import RunConfig

# How a run is laid out and watched: never what is computed, but for rounding.
_FREE = {"run.dir", "train.stop_after", "train.micro_batch", "train.save_every",
         "train.keep_checkpoints", "train.log_every", "data.prepared",
         "optim.ns_kernel_from"}  # fmt: skip


def decisive(config: RunConfig) -> dict[str, Any]:
    """Every key that decides the run's numbers, by its whole name, and its value."""
    return dict(_decisive(asdict(config)))


def _decisive(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        name = f"{prefix}.{key}" if prefix else str(key)
        if name in ("parallel", "kernels") or name.endswith(".parallel") or name in _FREE:
            continue
        if isinstance(value, dict) or (isinstance(value, list) and value):
            yield from _decisive(value, name)
        else:
            yield name, value
