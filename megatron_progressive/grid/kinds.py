"""Which keys of a grid's sizes make another kind of run, and not a larger or smaller one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_progressive.grid.cells import SizeCells
from megatron_progressive.runs.decisive import decisive

_SIZE_KEYS = ("train.steps", "train.global_batch", "data.sequence_length")
"""The numbers that make a size, beside the depth and those of ``model.``: what it is, and how much
it is trained on."""
_NOT_KINDS = ("run.", "schedule.name")  # the grid's own axes, and names


def kind_keys(bases: Sequence[SizeCells]) -> list[str]:
    """Keys of the configuration that make other kinds of run of a grid's sizes.

    These are all keys in which sizes differ and whose value is no number (``optim.name``), except
    ``model.preset``; and, where sizes of one kind have the same model and as much data, every
    number in which they differ (``optim.lr``).
    """
    entries = [{"to_layers": base.layers, **decisive(base.config)} for base in bases]
    keys = {
        key
        for key in {key for entry in entries for key in entry}
        if any(isinstance(entry.get(key), str | bool | list) for entry in entries)
        and not key.startswith(_NOT_KINDS)
        and key != "model.preset"
    }
    same: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        what = {
            key: repr(value)
            for key, value in entry.items()
            if key in keys
            or key == "to_layers"
            or key.startswith(("model.", *_SIZE_KEYS, *_NOT_KINDS))
        }
        same.setdefault(json.dumps(what, sort_keys=True), []).append(entry)
    for group in same.values():
        keys |= {key for entry in group for key in entry if _differ(group, key)}
    return sorted(key for key in keys if _differ(entries, key))


def _differ(entries: Sequence[dict[str, Any]], key: str) -> bool:
    return len({repr(entry.get(key)) for entry in entries}) > 1
