"""What a GPU would not forgive, seen from operations: tensors of two devices, memory that was
freed, and streams that read what another has not finished writing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from . import native

_MOVES = {"copy_", "_to_copy", "_foreach_copy_", "_copy_from", "_copy_from_and_resize"}
"""Operations between devices."""
_TAKES_CPU_INDICES = {
    "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put",
}  # fmt: skip


class Refused(RuntimeError):
    """An operation that a GPU would fail at, or compute wrongly."""


def refuse_mixed_devices(func: Any, leaves: Iterable[Any]) -> None:
    """CUDA kernels take tensors of one device, and numbers (tensors of no dimension) of the host.

    Raises:
        Refused: others.
    """
    name = func._schema.name.split("::")[1]
    if name in _MOVES:
        return
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    devices = {t.device for t in tensors if t.is_cuda}
    devices |= {
        t.device for t in tensors
        if not t.is_cuda and t.dim() > 0 and name not in _TAKES_CPU_INDICES
    }  # fmt: skip
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise Refused(f"stand-in: {func} was handed tensors of two devices: {found}")


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(tensor.size(), tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _by_access(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[torch.Tensor, bool]]:
    """The CUDA tensors of a call, and whether it writes them."""
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value):
            yield tensor, writes


class Checks:
    """Asked before and after each operation under ``checking``."""

    def before(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], memory_stays: bool
    ) -> None:
        """Whether an operation may use the memory of its arguments.

        Args:
            memory_stays: it makes a view, or asks about a tensor, and touches no memory.

        Raises:
            Refused: the memory was freed, or another stream has not finished writing it.
        """
        if memory_stays:
            return
        for tensor, writes in _by_access(func, args, kwargs):
            self._access(func, tensor, writes)

    def after(self, func: Any, results: list[torch.Tensor]) -> None:
        """New tensors are written by the stream that made them."""
        for tensor in results:
            if tensor.is_cuda:
                self._access(func, tensor, True)

    def _access(self, func: Any, tensor: torch.Tensor, writes: bool) -> None:
        address, size = _extent(tensor)
        if not size:
            return
        line = native.freed(address)
        if line is None:
            stream = torch.cuda.current_stream(tensor.device).cuda_stream
            line = native.access(stream, address, size, writes, str(func))
        if line is not None:
            raise Refused(f"stand-in: {func}: {line}")
