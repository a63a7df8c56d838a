"""The numbers of a step, summed over ranks, which a device may still be working on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Sums:
    """What :func:`sum_over_ranks` found."""

    loss: float
    stops: float
    counts: torch.Tensor
    same: list[float]


class PendingSums:
    """:class:`Sums` on their way to the host: who asks for them waits for the device, and for
    everything that was launched before."""

    def __init__(self, values: torch.Tensor, counts: int) -> None:
        self._counts = counts
        self._copied: torch.cuda.Event | None = None
        self.late = values.is_cuda
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    @cached_property
    def found(self) -> Sums:
        if self._copied is not None:
            self._copied.synchronize()
        loss, stops = self._values[:2].tolist()
        end = 2 + self._counts
        return Sums(loss, stops, self._values[2:end], self._values[end:].tolist())


def sum_over_ranks(
    loss: Any,
    stop: float,
    counts: torch.Tensor | None,
    device: torch.device,
    same: Sequence[torch.Tensor] = (),
) -> PendingSums:
    """The sums of a loss, of wishes to stop and of counts, by one all-reduce over all ranks.

    The host waits for the device when these are first read, and nowhere else in a step of a dense
    model.

    Args:
        loss: a number, or a tensor of one on the device.
        counts: flat, fp64, on the device.
        same: tensors of one number on the device, equal on every rank: read with the sums.
    """
    number = 0 if counts is None else counts.numel()
    values = torch.zeros(2 + number, dtype=torch.float64, device=device)
    values[0], values[1] = loss, stop
    if counts is not None:
        values[2:] = counts
    dist.all_reduce(values)
    return PendingSums(torch.cat([values, *(one.double().view(1) for one in same)]), number)


def _no_load(counts: torch.Tensor) -> None:
    return None


class StepMetrics:
    """The numbers of one optimizer step, which are equal on every rank. The first that is read
    waits for the step's end on the device."""

    def __init__(
        self,
        sums: PendingSums,
        grad_norm: Callable[[list[float]], float],
        expert_load: Callable[[torch.Tensor], float | None] = _no_load,
    ) -> None:
        """
        Args:
            grad_norm: from the numbers that the sums have besides.
            expert_load: from their counts.
        """
        self._sums, self._grad_norm, self._expert_load = sums, grad_norm, expert_load

    @property
    def late(self) -> bool:
        """Whether reading waits for a device, which meanwhile could begin the next step."""
        return self._sums.late

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the global batch before the update, in nats per token or image."""
        return self._sums.found.loss

    @property
    def grad_norm(self) -> float:
        """Norm of the global gradient, before clipping."""
        return self._grad_norm(self._sums.found.same)

    @property
    def stop(self) -> bool:
        """Whether any rank was asked to stop, because a signal arrived there."""
        return self._sums.found.stops > 0

    @property
    def expert_load(self) -> float | None:
        """Tokens of the busiest expert over the mean, in the least balanced layer; None without
        experts that a bias balances."""
        return self._expert_load(self._sums.found.counts)
