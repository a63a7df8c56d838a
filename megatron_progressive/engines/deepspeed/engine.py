"""The DeepSpeed engine: ZeRO stages 0 to 3, data parallel, on Megatron-core's model.

Stages 1 to 3 are DeepSpeed's own, with our optimizer on their partitions. At stage 0 DeepSpeed
averages the gradients and our optimizer does the rest. DeepSpeed would accumulate gradients in bf16
there, so the fp32 sums and the master weights are ours, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import (
    _update_router_expert_bias,
    reset_model_temporary_tensors,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from megatron_progressive.config import OptimSection, RunConfig
from megatron_progressive.engines.base import (
    NO_SHARES,
    GlobalBatch,
    mean_over,
)
from megatron_progressive.engines.deepspeed import state as deepspeed_state
from megatron_progressive.engines.megatron.context import SequencePart
from megatron_progressive.engines.megatron.expert_load import ExpertLoad
from megatron_progressive.engines.megatron.inputs import model_inputs
from megatron_progressive.engines.megatron.kernels import kernels_here
from megatron_progressive.engines.megatron.model import (
    build_chunk,
    canonical_buffers,
    canonical_names,
    forget_graph,
    transformer_config,
)
from megatron_progressive.engines.step_metrics import StepMetrics, sum_over_ranks
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import TensorSpec, TransformerShape
from megatron_progressive.optim.flat import SHARES, Cut, FlatOptimizer
from megatron_progressive.reshard.boxes import ShardedState
from megatron_progressive.runtime.groups import ProcessGroups
from megatron_progressive.runtime.late_memory import LateMemory
from megatron_progressive.runtime.layout import Layout
from megatron_progressive.runtime.memory import collect

_BUCKET_NUMEL = 50_000_000
"""The most gradient elements that DeepSpeed collects before it reduces them."""


class DeepSpeedEngine:
    """One model and optimizer under one ZeRO stage. Making one is collective over all ranks.

    Weights are uninitialised and optimizer state is zero until the caller fills the boxes of
    :meth:`state` and calls :meth:`loaded`. Building holds the whole model on each rank for a
    moment, also at stage 3.

    Raises:
        RuntimeError: DeepSpeed has another version, or the tensors differ from the family's table.
    """

    _alive = 0  # engines that share DeepSpeed's globals

    def __init__(
        self,
        config: RunConfig,
        shape: TransformerShape,
        layout: Layout,
        memory: LateMemory | None = None,
    ) -> None:
        deepspeed_state.check_version()
        deepspeed_state.import_deepspeed()
        self.layout, self.shape, self.config = layout, shape, config
        self.groups = ProcessGroups(layout)
        self._stage, self._bf16 = layout.zero_stage, config.train.precision == "bf16"
        model_parallel_cuda_manual_seed(config.run.seed % 2**31, force_reset_rng=True)
        dtype = torch.bfloat16 if self._bf16 else torch.float32
        kernels = kernels_here(config, shape, layout)
        self._transformer = transformer_config(shape, self.groups, dtype, kernels)
        with memory.parameters() if memory else nullcontext():
            core = build_chunk(shape, self.groups, self._transformer, 0).to(dtype)
        self._names, self._table = canonical_names(core, self.groups), tensor_table(shape)
        _check_shapes(self._names, self._table)
        parameters = list(self._names.values())
        rank, optim = self.groups.data_rank, config.optim
        self.optimizer = (
            FlatOptimizer(parameters, optim, rank, self.groups.replica_group)
            if self._stage
            else ReplicatedOptimizer(parameters, optim)
        )
        with memory.state() if memory else nullcontext():
            self.engine = deepspeed_state.start(core, self.optimizer, self._deepspeed_config())
            if isinstance(self.optimizer, ReplicatedOptimizer):
                self.optimizer.attach_replicated(self._names, self._table)
            else:
                deepspeed_state.attach(
                    self.engine, self.optimizer, self._names, self._table, self._stage
                )
        # after the start, which converts them to the weights' type
        self._buffers = canonical_buffers(core, self.groups)
        self._load = ExpertLoad(shape, [core])
        DeepSpeedEngine._alive += 1
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._part = SequencePart.of(shape.sequence_length, device=self._device)
        # documents are packed into one row of tokens where layers take that
        self._packed = kernels.transformer_engine and config.data.attention is not None

    def train_step(
        self, batch: GlobalBatch, lr: float, stop: bool = False,
        shares: Mapping[str, float] = NO_SHARES,
    ) -> StepMetrics:  # fmt: skip
        for group in self.optimizer.param_groups:
            group |= {"lr": lr, SHARES: shares}
        micro = self.config.train.micro_batch
        samples = batch.micro_batches(micro, self.groups.data_rank, self.layout.data)
        # losses of their own that Megatron-core adds in the backward pass
        scale = torch.full((1,), 1 / len(samples), device=self._device)
        MoEAuxLossAutoScaler.set_loss_scale(scale)
        MTPLossAutoScaler.set_loss_scale(scale)
        losses = []
        for number, sample in enumerate(samples, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(samples))
            loss = self._loss(sample, micro)
            losses.append(loss.detach())
            self.engine.backward(loss / len(samples), scale_wrt_gas=False)
        self._load.read()
        if self._buffers:
            _update_router_expert_bias([self.engine.module], self._transformer)
            reset_model_temporary_tensors(self._transformer, [self.engine.module])
        self.engine.step()
        share = batch.share_of_mean(losses, [micro] * len(losses), self.layout.data)
        sums = sum_over_ranks(share, float(stop), self._load.counts, self._device)
        if isinstance(self.optimizer, ReplicatedOptimizer):
            norm = self.optimizer.grad_norm
        else:
            norm = float(self.engine.get_global_grad_norm())
        return StepMetrics(sums, lambda _: norm, self._load.busiest)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[GlobalBatch]) -> float:
        self.engine.eval()
        means = [self._mean_of(batch) for batch in batches]
        self.engine.train()
        if self._stage == 3:
            deepspeed_state.release(self.engine)
        return mean_over(batches, means)

    def _mean_of(self, batch: GlobalBatch) -> float:
        """The mean loss of a batch of any number of samples. Collective over all ranks."""
        micro, ranks = self.config.train.micro_batch, self.layout.data
        samples = batch.filled(micro, self.groups.data_rank, ranks)
        losses = [self._loss(sample, counted) for sample, counted in samples]
        share = batch.share_of_mean(losses, [counted for _, counted in samples], ranks)
        return sum_over_ranks(share, 0.0, None, self._device).found.loss

    def state(self) -> ShardedState:
        return deepspeed_state.sharded_state(
            self.optimizer, self._names, self._buffers, self._table, self._stage, self._bf16
        )

    def loaded(self) -> None:
        deepspeed_state.follow_weights(self.engine, self._stage, self._bf16)

    def drop_gradients(self) -> None:
        for parameter in self._names.values():
            parameter.grad = None
        if isinstance(self.optimizer, ReplicatedOptimizer):
            self.optimizer.drop_sums()
        else:
            deepspeed_state.drop_gradients(self.engine, self._stage, self._bf16)

    def activate(self) -> None:
        self.groups.activate()

    def close(self) -> None:
        DeepSpeedEngine._alive -= 1
        forget_graph(self.engine.module)
        deepspeed_state.close(self.engine, self.engine.module, not DeepSpeedEngine._alive)
        del self.engine, self.optimizer, self._names, self._buffers, self._load
        self.groups.close()
        collect()  # its parts refer to each other, and its tensors are large

    def _deepspeed_config(self) -> dict[str, Any]:
        bucket = min(_BUCKET_NUMEL, sum(spec.numel for spec in self._table.values()))
        return {
            "train_micro_batch_size_per_gpu": self.config.train.micro_batch,
            # Micro-batches are counted and averaged here; DeepSpeed is told which is the last.
            "gradient_accumulation_steps": 1,
            # its default clips, also updates that are no gradients any more
            "gradient_clipping": self.config.optim.clip_grad if self._stage else 0.0,
            "zero_allow_untested_optimizer": True,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": self._bf16 and self._stage > 0},
            "zero_optimization": {
                "stage": self._stage,
                "reduce_bucket_size": bucket,
                # No weight stays whole between steps: loaded() then needs no communication.
                "stage3_param_persistence_threshold": 0,
                "sub_group_size": 10**15,
            },
        }

    def _loss(self, sample: Any, counted: int) -> torch.Tensor:
        """The mean cross-entropy of the first ``counted`` samples of one micro-batch; 0 where none
        counts."""
        inputs = model_inputs(sample, self._part, self._device, self._packed)
        arguments, named = inputs.arguments
        losses: torch.Tensor = self.engine(*arguments, **named)
        losses = losses.view(-1, self.shape.sequence_length)
        return losses[:counted].float().mean() if counted else losses.new_zeros(())


class ReplicatedOptimizer(FlatOptimizer):
    """The optimizer of stage 0: every rank updates every tensor, from gradients that DeepSpeed has
    averaged.

    Weights in bf16 have an fp32 master copy and fp32 gradient sums here.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], optim: OptimSection) -> None:
        super().__init__(params, optim)
        self.grad_norm = 0.0
        self._master: dict[torch.Tensor, torch.Tensor] = {}
        self._sums: dict[torch.Tensor, torch.Tensor] = {}

    def attach_replicated(
        self, parameters: dict[str, torch.nn.Parameter], table: dict[str, TensorSpec]
    ) -> None:
        """Allocate the state, which is zero, and the fp32 copies of the weights that need one."""
        for name, parameter in parameters.items():
            weight = parameter.data
            if weight.dtype != torch.float32:
                weight = self._master[parameter] = weight.float()
                self._sums[parameter] = torch.zeros_like(weight)
                parameter.register_post_accumulate_grad_hook(self._adder())  # type: ignore[no-untyped-call]
            self.attach(parameter, weight, [Cut(name, table[name], {0: (0, weight.numel())})])

    def _adder(self) -> Callable[[torch.Tensor], None]:
        sums = self._sums

        def add(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                sums[parameter].add_(parameter.grad)
                parameter.grad = None

        return add

    def drop_sums(self) -> None:
        """Free the sums of gradients: there is no further step."""
        self._sums.clear()

    def gradient(self, param: torch.Tensor) -> torch.Tensor:
        return self._sums[param] if param in self._sums else super().gradient(param)

    def get_grads_for_reduction(self) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """The gradients that DeepSpeed is to average, as (dense, of experts); it asks every
        optimizer that has this method."""
        return [self.gradient(p) for p in self._fragments], {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        gradients = [self.gradient(param) for param in self._fragments]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        self.grad_norm = float(norm)
        most = self.optim.clip_grad
        if most and self.grad_norm > most:
            for gradient in gradients:
                gradient.mul_(most / (self.grad_norm + 1e-6))
        super().step()
        for parameter, master in self._master.items():
            parameter.copy_(master)
            self._sums[parameter].zero_()


def _check_shapes(parameters: dict[str, torch.nn.Parameter], table: dict[str, TensorSpec]) -> None:
    built = {name: parameter.numel() for name, parameter in parameters.items()}
    expected = {name: spec.numel for name, spec in table.items() if spec.trainable}
    for name in built.keys() | expected.keys():
        if built.get(name) != expected.get(name):
            raise RuntimeError(
                f"{name}: Megatron-core built {built.get(name)} elements, not {expected.get(name)}"
            )
