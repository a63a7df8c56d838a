"""What the training loop and the expansion hook need of an engine, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch

from megatron_progressive.engines.step_metrics import StepMetrics
from megatron_progressive.models.base import ModelShape
from megatron_progressive.reshard.boxes import ShardedState
from megatron_progressive.runtime.layout import Layout

NO_SHARES: Mapping[str, float] = MappingProxyType({})
"""All tensors have the whole learning rate."""


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step or one validation batch, over all ranks.

    ``read(first, count)`` gives samples by number: tokens, int64 [count, sequence_length + 1], or
    images (:class:`.data.images.LabelledImages`). Each rank reads only its own samples.
    """

    read: Callable[[int, int], Any]
    first: int
    count: int

    def micro_batches(self, size: int, rank: int, ranks: int) -> list[Any]:
        """The micro-batches of one data-parallel rank, of ``size`` samples each.

        Micro-batch m of rank r holds the ``size`` samples from first + (m * ranks + r) * size on.
        """
        if self.count % (size * ranks):
            raise ValueError(f"{self.count} samples in micro-batches of {size} on {ranks} ranks")
        return [
            self.read(self.first + (m * ranks + rank) * size, size)
            for m in range(self.count // (size * ranks))
        ]

    def filled(self, size: int, rank: int, ranks: int, multiple: int = 1) -> list[tuple[Any, int]]:
        """The micro-batches of one data-parallel rank for a batch of any number of samples whose
        losses alone are asked for, as pairs: ``size`` samples, and how many of the first of them
        count.

        All ranks have equally many micro-batches of one size, as pipelines and collectives need.
        Where the number of samples does not fill them, the samples that follow the batch do; these
        do not count.

        Args:
            multiple: the number of micro-batches of a rank is a multiple of this.
        """
        group = size * ranks * multiple
        number = -(-self.count // group) * multiple
        offsets = [(m * ranks + rank) * size for m in range(number)]
        return [
            (self.read(self.first + offset, size), min(size, max(0, self.count - offset)))
            for offset in offsets
        ]

    def share_of_mean(self, means: Sequence[Any], counted: Sequence[int], ranks: int) -> Any:
        """This data-parallel rank's part of the mean loss of the batch, to be summed over
        ``ranks``, in fp64.

        Args:
            means: the mean loss of the samples that count in each micro-batch: numbers, or tensors
                of one number, which are left on their device.
            counted: the number of these samples in each micro-batch.
        """
        if len(set(counted)) == 1 and counted[0] * len(counted) * ranks == self.count:
            return sum(_in_fp64(mean) for mean in means) / len(means) / ranks
        weighed = zip(means, counted, strict=True)
        return sum(_in_fp64(mean) * count for mean, count in weighed if count) / self.count


def _in_fp64(number: Any) -> Any:
    return number.double() if isinstance(number, torch.Tensor) else float(number)


def in_batches(
    read: Callable[[int, int], Any], samples: int, size: int, first: int = 0
) -> list[GlobalBatch]:
    """Samples ``first`` to ``first + samples`` in batches of ``size``; the last batch may be
    smaller."""
    ends = range(first, first + samples, size)
    return [GlobalBatch(read, at, min(size, first + samples - at)) for at in ends]


def mean_over(batches: Sequence[GlobalBatch], means: Sequence[float]) -> float:
    """The mean loss over all samples of some batches, from the mean of each batch."""
    counts = [batch.count for batch in batches]
    if len(set(counts)) == 1:
        return sum(means) / len(means)
    weighed = zip(means, counts, strict=True)
    return sum(mean * count for mean, count in weighed) / sum(counts)


class Engine(Protocol):
    layout: Layout

    @property
    def shape(self) -> ModelShape: ...

    def train_step(
        self,
        batch: GlobalBatch,
        lr: float,
        stop: bool = False,
        shares: Mapping[str, float] = NO_SHARES,
    ) -> StepMetrics:
        """Do one optimizer step.

        Args:
            stop: this rank's wish to stop, which the metrics share with all ranks.
            shares: of the learning rate, by the name of each tensor that has not all of it, in
                weight decay as well. All tensors of a layer have the same. Where there are any
                ``schedule.rewarm_layers`` is ``new``.
        """

    def evaluate(self, batches: Sequence[GlobalBatch]) -> float:
        """The mean cross-entropy over the samples of all batches, in nats per token or image,
        without an update. A batch may have any number of samples, whatever the micro-batch and the
        ranks."""

    def state(self) -> ShardedState:
        """This rank's boxes, as views. In a new engine the weights are unset and everything else is
        zero."""

    def loaded(self) -> None:
        """Let everything that the engine derives from the pieces of :meth:`state`, such as other
        copies of the weights, follow them; to be called once they have been written. Not
        collective."""

    def drop_gradients(self) -> None:
        """Free everything that lives from step to step and is no piece of :meth:`state`: sums of
        gradients, and copies of weights. The engine can still be evaluated, and takes no further
        step. Not collective."""

    def activate(self) -> None:
        """Make this engine's process groups the current ones, since two engines live at once at
        τ."""

    def close(self) -> None:
        """Release tensors and process groups. Collective over all ranks."""
