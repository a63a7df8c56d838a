"""What of a grid's sizes makes another kind of run, not a larger or smaller one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

_SIZE_KEYS = ("to_layers", "train.steps", "train.global_batch", "data.sequence_length")
"""Numbers that make a size, with those of ``model.``: what it is and what it is trained on."""


def kind_keys(sizes: Sequence[Any]) -> list[str]:
    """Keys of ``sizes`` that make other kinds of run of its entries, not larger or smaller ones.

    Those are all whose value is no number (``optim.name``), but for ``model.preset``; and where
    entries of one kind have the same model and as much data, every number in which these differ
    (``optim.lr``).
    """
    entries = [dict(_flat(size)) for size in sizes if isinstance(size, dict)]
    keys = {key for entry in entries for key, value in entry.items() if not _is_number(value)}
    keys -= {"name", "model.preset"}
    same: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        what = {
            key: value
            for key, value in entry.items()
            if key in keys or key in _SIZE_KEYS or key.startswith("model.")
        }
        same.setdefault(json.dumps(what, sort_keys=True, default=str), []).append(entry)
    for group in same.values():
        names = {key for entry in group for key in entry} - {"name"}
        keys |= {key for key in names if len({repr(entry.get(key)) for entry in group}) > 1}
    return sorted(keys)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
