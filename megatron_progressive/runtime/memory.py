"""Zero-filled tensors that cost nothing until they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

_SMALL = 1 << 20  # bytes; below, the allocator's own memory is already there


def zeros(size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU. The pages of a large tensor are zeroed by the system when they are first
    written, so that state which an expansion fills at once is written once, not twice."""
    nbytes = math.prod(size) * dtype.itemsize
    if nbytes < _SMALL:
        return torch.zeros(tuple(size), dtype=dtype)
    return torch.from_numpy(np.zeros(nbytes, np.uint8)).view(dtype).view(tuple(size))


def zeros_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Zeros of a tensor's shape, on its device."""
    if tensor.device.type != "cpu":
        return torch.zeros_like(tensor, dtype=dtype)
    return zeros(tensor.shape, dtype or tensor.dtype)
