"""What libraries must be told when the host computes: calls into C++ that no dispatcher sees."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

AFTER: dict[str, Callable[[ModuleType], None]] = {}
"""By module: what is called once it has been imported."""
