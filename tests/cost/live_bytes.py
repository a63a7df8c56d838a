"""Bytes of the tensors that are alive, counted as operators make them; on CPU too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages while they live. Scratch space inside an operator is not seen.

    Tensors that were there before are given to :meth:`add`; all others are seen when an operator
    returns them. The Python object of a storage lives as long as the storage (PyTorch keeps it),
    so its end is the storage's.
    """

    def __init__(self, before: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._resize = torch.UntypedStorage.resize_
        for tensor in before:
            self.add(tensor.untyped_storage())

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == "meta":
            return
        key, size = id(storage), storage.nbytes()
        known, counted = self._seen.get(key, (None, 0))
        if known is None or known() is not storage:
            known, counted = weakref.ref(storage, lambda _: self._freed(key)), 0
        self._seen[key] = known, size
        self.now += size - counted
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int) -> None:
        self.now -= self._seen.pop(key)[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf.untyped_storage())
        return result

    def __enter__(self) -> LiveBytes:
        # what is to be computed anew gives its memory back before its tensor goes
        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            self._resize(storage, size)
            self.add(storage)
            return storage

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exc)
