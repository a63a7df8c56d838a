"""Memory that comes late: tensors of a new engine that have none until they are filled.

At τ two engines live at once. The new one is made without the memory of its state, and gets it
piece by piece while the old one's goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_SMALL = 1 << 10
"""Bytes. What is smaller has its memory at once: numbers, vectors of small models."""

_aten = torch.ops.aten
_UNSET = {
    _aten.zeros.default, _aten.empty.memory_format, _aten.empty_strided.default,
    _aten.zeros_like.default, _aten.empty_like.default, _aten.new_zeros.default,
    _aten.new_empty.default, _aten.new_empty_strided.default,
}  # fmt: skip
"""What makes tensors of no values, or of zeros."""
_WITHOUT_ZEROS = {
    _aten.zeros.default: _aten.empty.memory_format,
    _aten.zeros_like.default: _aten.empty_like.default,
    _aten.new_zeros.default: _aten.new_empty.default,
}


class LateMemory:
    """The storages that have no memory yet, while they live.

    Inside :meth:`parameters` and :meth:`state` an engine is built. What it reads of tensors without
    memory is unset, and what it writes to them is lost, as the caller of an engine expects: weights
    are unset in a new engine, everything else is zero.
    """

    def __init__(self) -> None:
        self._lacking: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def lacks(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has no memory yet."""
        return tensor.device.type != "meta" and self._of(tensor.untyped_storage()) is not None

    def take(self, tensor: torch.Tensor) -> None:
        """Take the memory of a tensor that is unset or zero, with all views of it."""
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes < _SMALL or tensor.device.type == "meta" or not storage.resizable():
            return
        key = id(storage)
        self._lacking[key] = weakref.ref(storage, lambda _: self._lacking.pop(key, None)), nbytes
        storage.resize_(0)

    def nbytes(self, storage: torch.UntypedStorage) -> int:
        """The bytes of a storage once it has its memory."""
        return self._of(storage) or storage.nbytes()

    def give(self, storage: torch.UntypedStorage) -> int:
        """Give a storage its memory, unset; returns its bytes, and 0 where it had it already."""
        nbytes = self._of(storage)
        if nbytes is None:
            return 0
        del self._lacking[id(storage)]
        storage.resize_(nbytes)
        return nbytes

    def give_zeros(self, storage: torch.UntypedStorage) -> int:
        """As :meth:`give`, zero-filled."""
        given = self.give(storage)
        if given:
            as_bytes(storage).zero_()
        return given

    def give_rest(self) -> None:
        """Give all that is left its memory, zero-filled."""
        for reference, _ in list(self._lacking.values()):
            storage = reference()
            if storage is not None:
                self.give_zeros(storage)

    def _of(self, storage: torch.UntypedStorage) -> int | None:
        known, nbytes = self._lacking.get(id(storage), (None, 0))
        return nbytes if known is not None and known() is storage else None

    @contextmanager
    def parameters(self) -> Iterator[None]:
        """Parameters that modules register meanwhile have no memory; all other tensors do."""

        def register(module: torch.nn.Module, name: str, parameter: Any) -> None:
            if parameter is not None:
                self.take(parameter)

        hook = torch.nn.modules.module.register_module_parameter_registration_hook(register)
        try:
            with _Building(self, unset=False):
                yield
        finally:
            hook.remove()

    def state(self) -> TorchDispatchMode:
        """Tensors that are made meanwhile, unset or of zeros, have no memory."""
        return _Building(self, unset=True)

    def views(self) -> TorchDispatchMode:
        """Views may be taken meanwhile of tensors that have no memory."""
        return _Building(self, unset=False)

    @contextmanager
    def lent(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Tensors have memory for a moment: torch makes no view beyond the end of a storage."""
        lacking = {id(s): s for s in (t.untyped_storage() for t in tensors) if self._of(s)}
        for key, storage in lacking.items():
            storage.resize_(self._lacking[key][1])
        try:
            yield
        finally:
            for storage in lacking.values():
                storage.resize_(0)


def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage as a tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _Building(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators on tensors some of which have no memory.

    Args:
        unset: whether tensors that are made of no values, or of zeros, have none.
    """

    def __init__(self, memory: LateMemory, unset: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory, self._unset = memory, unset

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _UNSET:
            if not self._unset:
                return func(*args, **kwargs)
            result = _WITHOUT_ZEROS.get(func, func)(*args, **kwargs)
            self._memory.take(result)
            if func in _WITHOUT_ZEROS and not self._memory.lacks(result):
                result.zero_()
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(self._memory.lacks(tensor) for tensor in given):
            return func(*args, **kwargs)
        schema = func._schema
        if schema.is_mutable:  # what it would write is lost
            return kwargs.get("out", args[0]) if schema.returns else None
        aliases = any(argument.alias_info is not None for argument in schema.arguments)
        if aliases or not any("Tensor" in str(r.type) for r in schema.returns):
            with self._memory.lent(given):
                return func(*args, **kwargs)
        return self._without_values(func, args, kwargs)

    def _without_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """New tensors of the shapes and types that an operator would give."""
        device = next(t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))

        def to_meta(leaf: Any) -> Any:
            return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf

        def real(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            made = torch.empty_strided(
                leaf.size(), leaf.stride(), dtype=leaf.dtype, device=kwargs.get("device") or device
            )
            self._memory.take(made)
            return made

        if "device" in kwargs and kwargs["device"] is not None:
            inside = {**kwargs, "device": torch.device("meta")}
        else:
            inside = kwargs
        return tree_map(real, func(*tree_map(to_meta, args), **tree_map(to_meta, inside)))
