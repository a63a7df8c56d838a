"""What the training loop and the expansion hook need of an engine, and no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_progressive.models.base import ModelShape
from megatron_progressive.reshard.boxes import ShardedState
from megatron_progressive.runtime.layout import Layout


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step or one validation batch, over all ranks.

    ``read(first, count)`` gives samples by number: tokens, int64 [count, sequence_length + 1], or
    images (:class:`.data.images.LabelledImages`). Each rank reads just its own.
    """

    read: Callable[[int, int], Any]
    first: int
    count: int

    def micro_batches(self, size: int, rank: int, ranks: int) -> list[Any]:
        """This data-parallel rank's micro-batches, of ``size`` samples each.

        Micro-batch m of rank r holds samples first + (m * ranks + r) * size and on.
        """
        if self.count % (size * ranks):
            raise ValueError(f"{self.count} samples in micro-batches of {size} on {ranks} ranks")
        return [
            self.read(self.first + (m * ranks + rank) * size, size)
            for m in range(self.count // (size * ranks))
        ]

    def filled(self, size: int, rank: int, ranks: int, multiple: int = 1) -> list[tuple[Any, int]]:
        """The same for a batch of any count, of which the losses are asked only: each micro-batch
        of ``size`` samples, and how many of its first ones count.

        All ranks have as many micro-batches, of one size, as pipelines and collectives need. The
        samples that follow the batch fill up what its count leaves over; they do not count.

        Args:
            multiple: of how many micro-batches a rank is to have; more of them are filled up.
        """
        group = size * ranks * multiple
        number = -(-self.count // group) * multiple
        offsets = [(m * ranks + rank) * size for m in range(number)]
        return [
            (self.read(self.first + offset, size), min(size, max(0, self.count - offset)))
            for offset in offsets
        ]

    def share_of_mean(self, means: Sequence[Any], counted: Sequence[int], ranks: int) -> float:
        """This data-parallel rank's part of the batch's mean loss, to be summed over ``ranks``.

        Args:
            means: mean loss of the samples that count in each micro-batch.
            counted: how many these are.
        """
        if len(set(counted)) == 1 and counted[0] * len(counted) * ranks == self.count:
            return sum(float(mean) for mean in means) / len(means) / ranks
        weighed = zip(means, counted, strict=True)
        return sum(float(mean) * count for mean, count in weighed if count) / self.count


def in_batches(
    read: Callable[[int, int], Any], samples: int, size: int, first: int = 0
) -> list[GlobalBatch]:
    """Samples ``first`` to ``first + samples`` in batches of ``size``; the last may be smaller."""
    ends = range(first, first + samples, size)
    return [GlobalBatch(read, at, min(size, first + samples - at)) for at in ends]


def mean_over(batches: Sequence[GlobalBatch], means: Sequence[float]) -> float:
    """Mean loss over all samples of some batches, from the mean of each."""
    counts = [batch.count for batch in batches]
    if len(set(counts)) == 1:
        return sum(means) / len(means)
    weighed = zip(means, counts, strict=True)
    return sum(mean * count for mean, count in weighed) / sum(counts)


@dataclass(frozen=True)
class StepMetrics:
    """Of one optimizer step, equal on every rank."""

    loss: float
    """Mean cross-entropy of the global batch before the update, nats per token or image."""
    grad_norm: float
    """Norm of the global gradient, before clipping."""
    stop: bool
    """Whether any rank was asked to stop (a signal arrived)."""
    expert_load: float | None = None
    """Tokens of the busiest expert over the mean, of the least balanced layer; None without
    experts that are balanced by a bias."""


def sum_over_ranks(
    loss: float, stop: float, counts: torch.Tensor | None, device: torch.device
) -> tuple[float, float, torch.Tensor]:
    """The sums of a loss, of wishes to stop and of counts (fp64), in one all-reduce over all
    ranks."""
    parts = [torch.tensor([loss, stop], dtype=torch.float64)]
    values = torch.cat(parts if counts is None else [*parts, counts]).to(device)
    dist.all_reduce(values)
    return float(values[0]), float(values[1]), values[2:].cpu()


class Engine(Protocol):
    layout: Layout

    @property
    def shape(self) -> ModelShape: ...

    def train_step(self, batch: GlobalBatch, lr: float, stop: bool = False) -> StepMetrics:
        """One optimizer step. ``stop`` is this rank's wish to stop, shared in the metrics."""

    def evaluate(self, batches: Sequence[GlobalBatch]) -> float:
        """Mean cross-entropy over the samples of all batches, nats per token or image, without an
        update. A batch may have any count, whatever the micro-batch and the ranks."""

    def state(self) -> ShardedState:
        """This rank's boxes, as views. In a new engine weights are unset, all else is zero."""

    def loaded(self) -> None:
        """To be called once the pieces of :meth:`state` have been written: what the engine
        derives from them (other copies of the weights) follows. Not collective."""

    def activate(self) -> None:
        """Make this engine's process groups the current ones (two engines live at once at τ)."""

    def close(self) -> None:
        """Release tensors and process groups. Collective over all ranks."""
