"""Freeing memory, and the host memory through which values go to a device."""

from __future__ import annotations

import gc

import torch


def collect() -> None:
    """Free tensors that refer to each other, and give the device back what the allocator keeps of
    freed ones: the next model's are of other sizes, and NCCL allocates past the allocator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sent_to(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values of the host on a device, by way of page-locked memory: the host goes on meanwhile."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class Staging:
    """fp32 host memory that values are made in, on their way to where they belong.

    On the way to a CUDA device it is page-locked: the copy then is one transfer that the host does
    not wait for. There are two buffers, so that one is filled while the other is read.
    """

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self._buffers: list[torch.Tensor] = []
        self._read: list[torch.cuda.Event | None] = []
        self._next = 0

    def buffer(self, numel: int, device: torch.device) -> torch.Tensor:
        """Memory of ``numel`` elements for values that go to ``device``, flat. It may be written at
        once; what the last but one call gave is no longer of use."""
        cuda = device.type == "cuda"
        while len(self._buffers) < (2 if cuda else 1):
            self._buffers.append(torch.empty(self.numel, pin_memory=cuda))
            self._read.append(None)
        self._next = (self._next + 1) % len(self._buffers)
        if (read := self._read[self._next]) is not None:
            read.synchronize()
        return self._buffers[self._next][:numel]

    def sent(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """What was written to the last buffer, on the device (itself where that is the CPU)."""
        if device.type != "cuda":
            return values
        there = values.to(device, non_blocking=True)
        self._read[self._next] = torch.cuda.current_stream().record_event()
        return there
