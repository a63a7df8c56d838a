"""The plain torch engine, data parallel only, for models that Megatron-core does not have.

Every rank has the whole model. At ZeRO stage 0 each rank updates all of it; at stage 1 ranks divide
the work and the state of the optimizer (:mod:`.buffers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_progressive.config import RunConfig
from megatron_progressive.engines.base import (
    NO_SHARES,
    GlobalBatch,
    mean_over,
)
from megatron_progressive.engines.step_metrics import StepMetrics, sum_over_ranks
from megatron_progressive.engines.torch.buffers import FlatModel
from megatron_progressive.engines.torch.resnet_module import ResNet
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.models.families.resnet import ResNetShape
from megatron_progressive.reshard.boxes import ShardedState
from megatron_progressive.runtime.late_memory import LateMemory
from megatron_progressive.runtime.layout import Layout
from megatron_progressive.runtime.memory import collect, sent_to


class TorchEngine:
    """One residual network and its optimizer. Making one is collective over all ranks.

    Weights are uninitialised and optimizer state is zero until the caller fills the boxes of
    :meth:`state`, and these have no memory until ``memory`` gives it.

    Raises:
        RuntimeError: the tensors differ from the family's table.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: ResNetShape,
        layout: Layout,
        memory: LateMemory | None = None,
    ) -> None:
        self.layout, self.shape, self.config = layout, shape, config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        with torch.device("meta"):  # initial values come from the state's generator
            model = ResNet(shape)
        with memory.state() if memory else nullcontext():
            self._model = model.to(self._dtype).to_empty(device=self._device)
            parameters, table = dict(self._model.named_parameters()), tensor_table(shape)
            _check(parameters, table)
            self._flat = FlatModel(parameters, table, config.optim, divided=layout.zero_stage >= 1)

    def train_step(
        self, batch: GlobalBatch, lr: float, stop: bool = False,
        shares: Mapping[str, float] = NO_SHARES,
    ) -> StepMetrics:  # fmt: skip
        self._flat.zero_gradients()
        micro, ranks = self.config.train.micro_batch, self.layout.data
        samples, losses = batch.micro_batches(micro, dist.get_rank(), ranks), []
        for sample in samples:
            loss = self._loss(sample, micro)
            (loss / len(samples)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        norm = self._flat.step(lr, self.config.optim.clip_grad, shares)
        share = batch.share_of_mean(losses, [micro] * len(losses), ranks)
        sums = sum_over_ranks(share, float(stop), None, self._device, [norm])
        return StepMetrics(sums, lambda same: same[0])

    @torch.no_grad()
    def evaluate(self, batches: Sequence[GlobalBatch]) -> float:
        return mean_over(batches, [self._mean_of(batch) for batch in batches])

    def _mean_of(self, batch: GlobalBatch) -> float:
        """The mean loss of a batch of any number of samples. Collective over all ranks."""
        micro, ranks = self.config.train.micro_batch, self.layout.data
        samples = batch.filled(micro, dist.get_rank(), ranks)
        losses = [self._loss(sample, counted) for sample, counted in samples]
        share = batch.share_of_mean(losses, [counted for _, counted in samples], ranks)
        return sum_over_ranks(share, 0.0, None, self._device).found.loss

    def state(self) -> ShardedState:
        return self._flat.state()

    def loaded(self) -> None:
        pass  # the pieces are all there is

    def drop_gradients(self) -> None:
        for bucket in self._flat.buckets:
            bucket.gradients.untyped_storage().resize_(0)

    def activate(self) -> None:
        pass  # the world's group is the only one

    def close(self) -> None:
        del self._model, self._flat
        collect()  # parameters and the hooks on them refer to each other

    def _loss(self, sample: tuple[torch.Tensor, torch.Tensor], counted: int) -> torch.Tensor:
        """The mean cross-entropy of the first ``counted`` samples of one micro-batch (pixels,
        labels); 0 where none counts."""
        pixels, labels = sample
        logits: torch.Tensor = self._model(sent_to(pixels, self._device).to(self._dtype))
        logits = logits.float()
        labels = sent_to(labels, self._device)
        if not counted:
            return logits.new_zeros(())
        return F.cross_entropy(logits[:counted], labels[:counted])


def _check(parameters: dict[str, torch.nn.Parameter], table: dict[str, TensorSpec]) -> None:
    built = {name: parameter.numel() for name, parameter in parameters.items()}
    expected = {name: spec.numel for name, spec in table.items()}
    for name in built.keys() | expected.keys():
        if built.get(name) != expected.get(name):
            raise RuntimeError(
                f"{name}: the module has {built.get(name)} elements, not {expected.get(name)}"
            )
