"""The plain torch engine: data parallel only, for models that Megatron-core does not have.

Every rank has the whole model. At ZeRO stage 0 each updates all of it, at stage 1 ranks divide the
optimizer's work and state (:mod:`.torch_buffers`).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_progressive.config import RunConfig
from megatron_progressive.engines.base import GlobalBatch, StepMetrics, sum_over_ranks
from megatron_progressive.engines.torch_buffers import FlatModel
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.models.resnet import ResNetShape
from megatron_progressive.models.resnet_module import ResNet
from megatron_progressive.runtime.layout import Layout
from megatron_progressive.state.boxes import ShardedState


class TorchEngine:
    """One residual network and its optimizer. Making one is collective over all ranks.

    Weights are uninitialised and optimizer state is zero until the caller fills the boxes of
    :meth:`state`.

    Raises:
        RuntimeError: tensors that differ from the family's.
    """

    def __init__(self, config: RunConfig, shape: ResNetShape, layout: Layout) -> None:
        self.layout, self.shape, self.config = layout, shape, config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        with torch.device("meta"):  # initial values come from the state's generator
            model = ResNet(shape)
        self._model = model.to(self._dtype).to_empty(device=self._device)
        parameters, table = dict(self._model.named_parameters()), tensor_table(shape)
        _check(parameters, table)
        self._flat = FlatModel(parameters, table, config.optim, divided=layout.zero_stage >= 1)

    def train_step(self, batch: GlobalBatch, lr: float, stop: bool = False) -> StepMetrics:
        self._flat.zero_gradients()
        samples, losses = self._samples(batch), []
        for pixels, labels in samples:
            loss = self._loss(pixels, labels)
            (loss / len(samples)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        norm = self._flat.step(lr, self.config.optim.clip_grad)
        total, stops = self._sum_over_ranks(losses, float(stop))
        return StepMetrics(total, norm, stops > 0)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[GlobalBatch]) -> float:
        means = [
            self._sum_over_ranks([self._loss(*sample) for sample in self._samples(batch)])[0]
            for batch in batches
        ]
        return sum(means) / len(means)

    def state(self) -> ShardedState:
        return self._flat.state()

    def loaded(self) -> None:
        pass  # the pieces are all there is

    def activate(self) -> None:
        pass  # the world's group is the only one

    def close(self) -> None:
        del self._model, self._flat
        gc.collect()  # parameters and the hooks on them refer to each other

    def _samples(self, batch: GlobalBatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(pixels, labels) of this rank's micro-batches."""
        micro = self.config.train.micro_batch
        return batch.micro_batches(micro, dist.get_rank(), self.layout.data)

    def _loss(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of one micro-batch."""
        logits = self._model(pixels.to(self._device, self._dtype, non_blocking=True))
        return F.cross_entropy(logits.float(), labels.to(self._device, non_blocking=True))

    def _sum_over_ranks(self, losses: list[torch.Tensor], stop: float = 0.0) -> tuple[float, float]:
        """The global mean loss, and the sum of ``stop``."""
        share = sum(float(loss) for loss in losses) / len(losses)
        return sum_over_ranks(share / self.layout.data, stop, None, self._device)[:2]


def _check(parameters: dict[str, torch.nn.Parameter], table: dict[str, TensorSpec]) -> None:
    built = {name: parameter.numel() for name, parameter in parameters.items()}
    expected = {name: spec.numel for name, spec in table.items()}
    for name in built.keys() | expected.keys():
        if built.get(name) != expected.get(name):
            raise RuntimeError(
                f"{name}: the module has {built.get(name)} elements, not {expected.get(name)}"
            )
