"""Aten operations on tensors of the stand-in, computed on the host.

Device memory is host memory, so a CUDA tensor has a twin on the CPU that shares it. This dispatch
mode runs each operation on the twins: everything above operations (autograd, streams, the caching
allocator, NCCL) is torch's CUDA code, and numbers are right.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import aten, native
from .checks import Checks, refuse_mixed_devices

AS_IT_IS = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_",
    "record_stream", "is_pinned", "_pin_memory", "_local_scalar_dense", "detach", "detach_",
    "alias", "is_same_size", "_has_compatible_shallow_copy_type", "_shallow_copy",
}  # fmt: skip
"""Operations without a kernel, or that copy plain memory: torch's own do what they should."""
_TO_HOST = "copy to the host"
_HOST = torch.device("cpu")


def twin(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on the same memory; a CPU tensor is its own."""
    if not tensor.is_cuda:
        return tensor
    storage = tensor.untyped_storage()
    size, address = storage.nbytes(), storage.data_ptr()
    if size == 0 or address == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    same = torch._C._construct_storage_from_data_pointer(address, _HOST, size)
    out = torch.empty(0, dtype=tensor.dtype)
    return out.set_(same, tensor.storage_offset(), tensor.size(), tensor.stride())


def _on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    out = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        twin(out).copy_(tensor)
    return out


class _Operation:
    """What is asked of an operation at each call."""

    def __init__(self, func: Any) -> None:
        self.space, self.name = func._schema.name.split("::")
        returns = func._schema.returns
        views = bool(returns) and all(
            one.alias_info is not None and not one.alias_info.is_write for one in returns
        )
        reshapes = torch.Tag.inplace_view in func.tags  # the tensor itself, as squeeze_ does
        self.plain = self.name in AS_IT_IS or views or reshapes
        self.random = torch.Tag.nondeterministic_seeded in func.tags
        self.call = aten.INSTEAD.get(self.name, func)


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The arguments of a call, with those of its lists in their places, and how they were given.
    Schemas have no lists of lists; torch's trees, which could, take longer than the operation."""
    leaves: list[Any] = []
    lengths: list[int | None] = []  # of each argument that is a list
    for one in (*args, *kwargs.values()):
        if isinstance(one, (list, tuple)):
            leaves.extend(one)
            lengths.append(len(one))
        else:
            leaves.append(one)
            lengths.append(None)
    return leaves, (len(args), tuple(kwargs), lengths)


def _given(leaves: list[Any], spec: Any) -> tuple[list[Any], dict[str, Any]]:
    """The inverse of :func:`_leaves`."""
    count, names, lengths = spec
    found, at = [], 0
    for length in lengths:
        found.append(leaves[at] if length is None else leaves[at : at + length])
        at += 1 if length is None else length
    return found[:count], dict(zip(names, found[count:], strict=True))


class OnHost(TorchDispatchMode):
    """Computes what concerns CUDA tensors on the host.

    Args:
        checks: what else to refuse; None: only what torch's own kernels refuse.
    """

    def __init__(self, checks: Checks | None = None) -> None:
        super().__init__()
        self._checks = checks
        self._known: dict[Any, _Operation] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would wrap each call, to keep a compiler away that is off here."""
        return False

    def leaves_alone(self, func: Any, gpu: list[torch.Tensor]) -> bool:
        """Whether torch's own function is called, whose kernels do nothing (for counting)."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = self._known.get(func)
        if operation is None:
            operation = self._known[func] = _Operation(func)
        leaves, spec = _leaves(args, kwargs)
        name = operation.name
        if operation.space == "c10d":
            aten.refuse_cpu_tensors(name, leaves)
        device = kwargs.get("device")
        wants = device is not None and torch.device(device).type == "cuda"
        gpu = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_cuda]
        if operation.space != "aten" or not (gpu or wants):
            return func(*args, **kwargs)
        plain = operation.plain
        if self._checks is not None and gpu:
            self._checks.before(func, args, kwargs, plain and name != "_local_scalar_dense")
        if plain:
            return func(*args, **kwargs)
        refuse_mixed_devices(func, leaves)
        if self.leaves_alone(func, gpu):
            return func(*args, **kwargs)
        if name == "copy_":
            return self._copy(args, kwargs)
        where = gpu[0].device if gpu else torch.device("cuda")
        target = torch.device(device) if device is not None else where
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())
        if target.type == "cpu" and not kwargs.get("non_blocking"):
            native.host_waits(_TO_HOST)
        return self._compute(func, operation, leaves, spec, target)

    def _copy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        to, source = args[0], args[1]
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if source.is_cuda and not to.is_cuda and waits:
            native.host_waits(_TO_HOST)
        twin(to).copy_(twin(source))
        return to  # type: ignore[no-any-return]

    def _compute(
        self, func: Any, operation: _Operation, leaves: list[Any], spec: Any, target: torch.device
    ) -> Any:
        originals: dict[int, torch.Tensor] = {}  # by the identity of their twins
        host: list[Any] = []
        generator: torch.Generator | None = None
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
                host.append(twin(leaf))
                originals[id(host[-1])] = leaf
            elif isinstance(leaf, torch.device) and leaf.type == "cuda":
                host.append(_HOST)
            elif isinstance(leaf, torch.Generator) and leaf.device.type == "cuda":
                generator = leaf
                host.append(None)
            else:
                host.append(leaf)
        args, kwargs = _given(host, spec)
        if "pin_memory" in kwargs:
            kwargs = {**kwargs, "pin_memory": None}
        if operation.random and target.type == "cuda":
            with _seeded(generator, target):
                result = operation.call(*args, **kwargs)
        else:
            result = operation.call(*args, **kwargs)
        back, shape = _leaves((result,), {})
        out: list[Any] = []
        for one in back:
            if not isinstance(one, torch.Tensor):
                out.append(one)
            elif id(one) in originals:
                out.append(originals[id(one)])
            else:
                out.append(_on_device(one, target) if target.type == "cuda" else one)
        if self._checks is not None:
            self._checks.after(func, [one for one in out if isinstance(one, torch.Tensor)])
        found = _given(out, shape)[0][0]
        return tuple(found) if isinstance(result, tuple) else found


@contextlib.contextmanager
def _seeded(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Random numbers as a function of the device's generator, whose state moves on: what was
    restored is drawn again. They are the host's, not the device's."""
    state = generator or torch.cuda.default_generators[device.index or 0]
    saved = torch.get_rng_state()
    torch.default_generator.manual_seed(
        (state.initial_seed() * 1000003 + state.get_offset()) % 2**63
    )
    state.set_offset(state.get_offset() + 4)
    try:
        yield
    finally:
        torch.set_rng_state(saved)


def enter_in_all_threads(make: Callable[[], TorchDispatchMode]) -> None:
    """The mode for this thread and for those that are started from now on; threads of autograd
    take it from the one that calls them."""
    make().__enter__()
    original = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def bootstrap(self: threading.Thread) -> None:
        with make():
            original(self)

    threading.Thread._bootstrap_inner = bootstrap  # type: ignore[attr-defined]


def prepare_torch() -> None:
    """What holds in all modes: without cuDNN, whose calls do nothing."""
    torch.backends.cudnn.enabled = False


def _print_copies() -> None:
    """torch turns dispatch modes off while it prints a tensor: it prints a copy on the host."""
    import torch._tensor_str as printing

    original = printing._str

    def text(tensor: torch.Tensor, *, tensor_contents: str | None = None) -> str:
        if not tensor.is_cuda or tensor_contents is not None:
            return original(tensor, tensor_contents=tensor_contents)
        there = original(tensor.detach().cpu())
        return f"{there.removesuffix(')')}, device='{tensor.device}')"

    printing._str = text


def install(checks: bool) -> None:
    """Call once torch is imported.

    Args:
        checks: refuse what the mode ``checking`` refuses.
    """
    prepare_torch()
    _print_copies()
    shared = Checks() if checks else None
    enter_in_all_threads(lambda: OnHost(shared))
