"""Counting: kernels are launched and do nothing, but what decides where a program goes is true.

Operations on a few elements (sizes of messages, counts of tokens, flags, norms of norms) are
computed on the host, and few elements that are made of nothing (indices, constants) are there. What
a kernel that did not run leaves in few elements reads as zero, so that losses and norms are finite
and the same each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from .computing import OnHost, enter_in_all_threads, prepare_torch, twin

FEW = 4096
"""Elements. More are those of activations and weights."""


class Counting(OnHost):
    """Computes on few elements only."""

    def leaves_alone(self, func: Any, gpu: list[torch.Tensor]) -> bool:
        return not gpu or max(tensor.numel() for tensor in gpu) > FEW

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        inputs = [
            leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)
        ]
        if not inputs and isinstance(result, torch.Tensor) and result.is_cuda:
            self._made(func, args, kwargs or {}, result)
        if any(tensor.is_cuda and tensor.numel() > FEW for tensor in inputs):
            storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
            for out in tree_flatten(result)[0]:
                if (
                    isinstance(out, torch.Tensor)
                    and out.is_cuda
                    and 0 < out.numel() <= FEW
                    and out.untyped_storage().data_ptr() not in storages
                ):
                    twin(out).zero_()
        return result

    def _made(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor
    ) -> None:
        """Fills what an operation made of no tensor, as the host would."""
        operation = self._known[func]
        if operation.plain or operation.random or not 0 < result.numel() <= FEW:
            return
        here = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
        given = {name: value for name, value in here.items() if name in kwargs}
        twin(result).copy_(func(*args, **given))


def _text(tensor: torch.Tensor, *, tensor_contents: Any = None) -> str:
    return f"tensor{tuple(tensor.shape)} {tensor.dtype} {tensor.device}"


def install() -> None:
    """Call once torch is imported."""
    import torch._tensor_str

    prepare_torch()
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans its kernels with calls of its own
    torch._tensor_str._str = _text  # there are no values to print
    enter_in_all_threads(Counting)
