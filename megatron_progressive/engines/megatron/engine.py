"""The Megatron engine: Megatron-core's model, schedules, DDP buffers and optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module

from megatron_progressive.config import RunConfig
from megatron_progressive.engines.base import (
    NO_SHARES,
    GlobalBatch,
    mean_over,
)
from megatron_progressive.engines.megatron.context import SequencePart
from megatron_progressive.engines.megatron.expert_load import ExpertLoad
from megatron_progressive.engines.megatron.inputs import model_inputs
from megatron_progressive.engines.megatron.kernels import kernels_here
from megatron_progressive.engines.megatron.model import (
    TIED_HEAD,
    build_chunk,
    canonical_buffers,
    canonical_names,
    engine_table,
    forget_graph,
    transformer_config,
)
from megatron_progressive.engines.megatron.optimizer import (
    TENSOR,
    build_optimizer,
    clip_gradients,
    norm_of,
)
from megatron_progressive.engines.megatron.owner_optimizer import owner_layout
from megatron_progressive.engines.megatron.state import sharded_state, table_with_tied_head
from megatron_progressive.engines.partitions import shared_embedding_is_whole
from megatron_progressive.engines.step_metrics import PendingSums, StepMetrics, sum_over_ranks
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.optim.flat import SHARES
from megatron_progressive.optim.owners import bucket_numel
from megatron_progressive.optim.rules import ADAMW
from megatron_progressive.optim.schedule import rewarms_new_layers
from megatron_progressive.reshard.boxes import ShardedState
from megatron_progressive.runtime.groups import ProcessGroups
from megatron_progressive.runtime.late_memory import LateMemory
from megatron_progressive.runtime.layout import Layout
from megatron_progressive.runtime.memory import collect


class MegatronEngine:
    """One model and optimizer in one layout. Making one is collective over all ranks.

    Weights are uninitialised and optimizer state is zero until the caller fills the boxes of
    :meth:`state`, and these have no memory until ``memory`` gives it.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: TransformerShape,
        layout: Layout,
        memory: LateMemory | None = None,
    ) -> None:
        self.layout, self.shape, self.config = layout, shape, config
        self.groups = ProcessGroups(layout)
        bf16 = config.train.precision == "bf16"
        dtype = torch.bfloat16 if bf16 else torch.float32
        # No dropout and no random initialisation: Megatron-core only asks that its RNG
        # tracker be set up.
        model_parallel_cuda_manual_seed(config.run.seed % 2**31, force_reset_rng=True)
        sharded = layout.distributed_optimizer
        kernels = kernels_here(config, shape, layout)
        transformer = transformer_config(shape, self.groups, dtype, kernels)
        with memory.parameters() if memory else nullcontext():
            chunks = [
                build_chunk(shape, self.groups, transformer, chunk)
                for chunk in range(layout.virtual_pipeline)
            ]
        named = [canonical_names(chunk, self.groups) for chunk in chunks]
        self._names = {name: weight for names in named for name, weight in names.items()}
        table = engine_table(tensor_table(shape), kernels.transformer_engine)
        self._table = table_with_tied_head(table) if shape.tie_embeddings else table
        buffers = DistributedDataParallelConfig(
            use_distributed_optimizer=sharded,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=kernels.overlap_gradients,
            overlap_param_gather=kernels.overlap_parameters,
            check_for_nan_in_grad=False,
        )
        with memory.state() if memory else nullcontext():
            self.chunks = [
                DistributedDataParallel(
                    transformer,
                    buffers,
                    Float16Module(transformer, chunk) if bf16 else chunk,
                    full_param_layout=self._buffer_layout(names, buffers) if sharded else None,
                )
                for chunk, names in zip(chunks, named, strict=True)
            ]
            self.optimizer = build_optimizer(
                self.chunks, self._names, self._table, config.optim, self.groups, bf16,
                by_layer=rewarms_new_layers(config),
            )  # fmt: skip
        self._buffers = {
            name: buffer
            for chunk in chunks
            for name, buffer in canonical_buffers(chunk, self.groups).items()
        }
        if kernels.overlap_gradients:  # only the last micro-batch's gradients are reduced
            no_syncs = [chunk.no_sync for chunk in self.chunks]
            transformer.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
        self._gathers_late, self._stepped = kernels.overlap_parameters, False
        transformer.grad_scale_func = None
        self._load = ExpertLoad(shape, chunks)
        transformer.finalize_model_grads_func = self._finalize_gradients
        self._forward_backward = get_forward_backward_func()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._part = SequencePart.of(
            shape.sequence_length, self.groups.context_rank, layout.context, self._device
        )
        # Transformer Engine's attention knows the order of tokens
        self._mask = None if kernels.transformer_engine else self._part.mask(dtype)
        # documents are packed into one row of tokens where layers take that
        self._packed = kernels.transformer_engine and config.data.attention is not None

    def _buffer_layout(
        self, names: dict[str, torch.nn.Parameter], buffers: DistributedDataParallelConfig
    ) -> FullParamLayout:
        """The places of a model chunk's parameters in the buffers that data-parallel ranks
        divide."""
        if self.config.optim.name != ADAMW:
            optim = self.config.optim
            embedding = shared_embedding_is_whole(self.shape, self.layout, optim)
            return owner_layout(names, self._table, optim, self.groups, buffers, embedding)
        ranks, experts = self.layout.replicas, self.layout.expert_data
        return DistributedOptimizer.compute_full_param_layout(
            list(names.values()), bucket_numel(ranks), ranks, buffers, experts
        )

    def train_step(
        self, batch: GlobalBatch, lr: float, stop: bool = False,
        shares: Mapping[str, float] = NO_SHARES,
    ) -> StepMetrics:  # fmt: skip
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        micro = self.config.train.micro_batch
        samples = batch.micro_batches(micro, self.groups.data_rank, self.layout.data)
        losses = self._run([(one, micro) for one in samples], forward_only=False)
        for group in self.optimizer.param_groups if self._names else ():
            # an optimizer with several tensors in a group has their factors and shares itself
            share = shares.get(group.get(TENSOR, ""), 1.0)
            group |= {"lr": lr * group.get("lr_factor", 1.0) * share, SHARES: shares}
        self.optimizer.prepare_grads()
        squares = clip_gradients(self.optimizer, self.config.optim.clip_grad)
        self.optimizer.step_with_ready_grads()
        self._stepped = True
        share = batch.share_of_mean(losses, [micro] * len(losses), self.layout.data)
        sums = self._sum_over_ranks(share, float(stop), self._load.counts, squares)
        return StepMetrics(sums, norm_of, self._load.busiest)

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        self._load.read()
        finalize_model_grads(*args, **kwargs)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[GlobalBatch]) -> float:
        for chunk in self.chunks:
            chunk.eval()
        means = [self._mean_of(batch) for batch in batches]
        for chunk in self.chunks:
            chunk.train()
        return mean_over(batches, means)

    def _mean_of(self, batch: GlobalBatch) -> float:
        """The mean loss of a batch of any number of samples. Collective over all ranks."""
        micro, ranks, layout = self.config.train.micro_batch, self.layout.data, self.layout
        # the interleaved schedule takes micro-batches in groups of one a stage
        group = layout.pipeline if layout.virtual_pipeline > 1 else 1
        samples = batch.filled(micro, self.groups.data_rank, ranks, group)
        losses = self._run(samples, forward_only=True)
        counted = [count for _, count in samples][: len(losses)]
        return self._sum_over_ranks(batch.share_of_mean(losses, counted, ranks)).found.loss

    def state(self) -> ShardedState:
        if self._gathers_late and self._stepped:  # the next forward pass would
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
        optimizers = self.optimizer.chained_optimizers
        return sharded_state(self._names, self._buffers, self._table, optimizers, self.groups)

    def loaded(self) -> None:
        pass  # the pieces are all there is

    def drop_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=False)  # they go nowhere

    def activate(self) -> None:
        self.groups.activate()

    def close(self) -> None:
        while self.chunks:  # a loop's variable would keep the last one past the collection below
            forget_graph(self.chunks.pop())
        del self.chunks, self.optimizer, self._names, self._buffers, self._forward_backward
        del self._load
        self.groups.close()
        # Buffers, parameters and groups refer to each other: memory, threads and connections
        # would stay until some later collection.
        collect()

    def _run(self, samples: list[tuple[Any, int]], forward_only: bool) -> list[torch.Tensor]:
        """The mean loss of the samples that count in each of this rank's micro-batches; only the
        last stage has any."""
        micro = self.config.train.micro_batch
        results = self._forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=[iter(samples) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(samples),
            seq_length=self.shape.sequence_length * (micro if self._packed else 1),
            micro_batch_size=1 if self._packed else micro,
            forward_only=forward_only,
        )
        return [result["loss"] for result in results] if self.groups.last_stage else []

    def _forward_step(self, samples: Iterator[tuple[Any, int]], model: Any) -> tuple[Any, Any]:
        tokens, counted = next(samples)
        inputs = model_inputs(tokens, self._part, self._device, self._packed, self._mask)
        arguments, named = inputs.arguments
        rows = (-1, self._part.length)  # of losses, also where all are in one
        loss = partial(_mean_loss, counted=counted, rows=rows, ranks=self.layout.context)
        return model(*arguments, **named), loss

    def _sum_over_ranks(
        self,
        share: Any,
        stop: float = 0.0,
        counts: torch.Tensor | None = None,
        same: Sequence[torch.Tensor] = (),
    ) -> PendingSums:
        """The global mean loss, sums of ``stop`` and ``counts``, and the numbers of ``same``."""
        # tensor-parallel ranks have the same losses, and context-parallel ranks parts of them
        share = 0.0 if self.groups.tensor_rank else share / self.layout.context
        return sum_over_ranks(share, stop, counts, self._device, same)


def _mean_loss(
    losses: torch.Tensor, counted: int, rows: tuple[int, int], ranks: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss of the first ``counted`` samples of losses, which are [samples, tokens] as
    ``rows``; 0 where none counts. The first number is this rank's part of the mean over equally
    many tokens of each of ``ranks`` context-parallel ranks."""
    losses = losses.view(rows)
    mean = losses[:counted].float().mean() if counted else losses.new_zeros((), dtype=torch.float32)
    # a clone: the schedule divides the loss in place by the number of micro-batches
    return mean / ranks if ranks > 1 else mean, {"loss": mean.detach().clone()}


__all__ = ["TIED_HEAD", "MegatronEngine"]
