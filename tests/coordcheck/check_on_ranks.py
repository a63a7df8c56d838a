"""What a rank does in the tests of the coordinate check: run it, whole or with a broken scale."""

from __future__ import annotations

from typing import Any

from megatron_progressive import models
from megatron_progressive.config import from_dict
from megatron_progressive.coordcheck import check as coordinate
from megatron_progressive.models import mup

BREAKS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "an embedding that is scaled as a matrix": (mup.FORMS, "embedding", "matrix"),
    "branches that do not know the depth": (mup.BRANCHES, mup.LAST, (0.0, 0.0)),
}


def failed_slopes(values: dict[str, Any], steps: int, broken: str | None) -> list[tuple[str, str]]:
    """(axis, quantity) of the slopes above 0.2."""
    config = from_dict(values)
    shapes = coordinate.shapes_of(config, [32, 64, 128], [1, 2, 4, 8])
    table, key, value = BREAKS[broken] if broken else ({}, "", None)
    before = table.get(key)
    models._table.cache_clear()
    try:
        if broken:
            table[key] = value
        check = coordinate.coordinate_check(config, shapes, steps, 0.2)
    finally:
        if broken:
            table[key] = before
        models._table.cache_clear()
    assert check.passed == all(s.passed for s in check.slopes)
    return [(s.axis, s.quantity) for s in check.slopes if not s.passed]
