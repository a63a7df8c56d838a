"""The Python side of the stand-in, inside the processes that run on it."""

from __future__ import annotations

from types import ModuleType

from . import hooks


def install(mode: str) -> None:
    """Prepares torch, and what needs it, for when they are imported."""

    def torch_came(torch: ModuleType) -> None:
        from . import computing, counting

        if mode == "counting":
            counting.install()
        else:
            computing.install(checks=mode == "checking")

    hooks.after("torch", torch_came)
    if mode == "counting":
        from . import counting_hooks as library
    else:
        from . import computing_hooks as library  # type: ignore[no-redef]
    for name, prepare in library.AFTER.items():
        hooks.after(name, prepare)
