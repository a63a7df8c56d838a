"""What libraries must be told when the host computes: calls that no dispatcher sees."""

from __future__ import annotations

from types import ModuleType


def _calls(package: ModuleType) -> None:
    from . import transformer_engine

    transformer_engine.replace_calls(transformer_engine.CALLS)


def _permutation(module: ModuleType) -> None:
    from . import transformer_engine

    transformer_engine.replace_permutation(module, transformer_engine.PERMUTATION)


AFTER = {
    "transformer_engine.pytorch": _calls,
    "transformer_engine.pytorch.triton.permutation": _permutation,
}
"""By module: what is called once it has been imported."""
