"""Other systems' Muon for ``tools/bench/muon.py``, on the model, ranks and loop of our engines.

Each is a subclass of one of our engines whose optimizer is not ours: the GPTModel, the batches,
forward and backward passes are the same. What they were given alike: momentum 0.95 (Nesterov),
five Newton-Schulz steps of Jordan's coefficients, weight decay, and the matrices under Muon where
a system lets them be named. What differs, as they come:

- ``torch`` (2.13): gradients all-reduced; every rank orthogonalises every matrix, one at a time,
  queries, keys and values as one, in bf16 (in fp32 with its cast taken away: it has no setting);
  AdamW on the rest.
- ``megatron`` (megatron-core 0.19.2, ``LayerWiseDistributedOptimizer``, needs emerging-optimizers):
  whole matrices have one owner each; one at a time, queries, keys and values apart, in fp32 or bf16
  (``muon_fp32_matmul_prec``); AdamW on the rest in its distributed optimizer. By default gradients
  are reduce-scattered and weights all-gathered in buffers that are laid out for it
  (``aligned``); the older way all-reduces gradients and gathers whole tensors of uneven size.
- ``deepspeed`` (0.19.8, ``optimizer: Muon``, ZeRO stage 1): a rank orthogonalises what its share
  touches (a matrix over a boundary on both sides), one at a time, queries, keys and values as one;
  ``gram`` iterates on the Gram matrix, in fp16 where the CPU has it and in fp32 elsewhere,
  ``standard`` in bf16; its update is compiled where the compiler is on. AdamW on the rest, which
  are all tensors with "embed" in their name, and vectors. It orthogonalises as the backward pass
  ends: that counts as the optimizer's part, with the copies into its flat gradient partition.

Two things are set right, for they do not run without:

- Megatron-core wraps the layer-wise optimizer's parts for bf16 weights only (0.19.2:
  ``layer_wise_optimizer.py``; with fp32 weights its chain fails on ``config``). Here they are its
  ``FP32Optimizer``.
- gloo's all-gather takes equal sizes. The older way's one call of it becomes what NCCL makes of
  uneven sizes: a broadcast from each rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import megatron.core.optimizer as megatron_optimizers
import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.layer_wise_optimizer import (
    LayerWiseDistributedOptimizer,
    tag_params_for_buffer_routing,
)
from megatron.core.optimizer.optimizer import FP32Optimizer

from megatron_progressive import engines
from megatron_progressive.config import OptimSection, RunConfig
from megatron_progressive.engines.deepspeed import state as deepspeed_state
from megatron_progressive.engines.deepspeed.engine import DeepSpeedEngine
from megatron_progressive.engines.megatron import engine as megatron
from megatron_progressive.engines.megatron.engine import MegatronEngine
from megatron_progressive.models import model_shape, tensor_table
from megatron_progressive.models.base import ModelShape, TensorSpec
from megatron_progressive.optim.rules import MUON, rule_of
from megatron_progressive.reshard.boxes import PARAM, Piece, ShardedState, whole
from megatron_progressive.reshard.initial_values import initialise_all
from megatron_progressive.runtime.layout import Layout, make_layout

Parameters = dict[str, torch.nn.Parameter]


class TorchMuonEngine(MegatronEngine):
    """``torch.optim.Muon`` and ``torch.optim.AdamW``; needs ``parallel.zero_stage=0``.

    Args:
        precision: the type of Newton-Schulz: ``fp32``, or ``bf16``, which is its own.
    """

    def __init__(
        self, config: RunConfig, shape: ModelShape, layout: Layout, precision: str
    ) -> None:
        super().__init__(config, shape, layout)
        optim = config.optim
        rules = {name: rule_of(self._table[name], optim) for name in self._names}
        matrices = [p for name, p in self._names.items() if rules[name] == MUON]
        others = [p for name, p in self._names.items() if rules[name] != MUON]
        settings = dict(lr=optim.lr, weight_decay=optim.weight_decay)
        muon = torch.optim.Muon(matrices, momentum=optim.momentum, ns_steps=5, **settings)
        adamw = torch.optim.AdamW(others, betas=(optim.beta1, optim.beta2), **settings)
        cast = torch.Tensor.float if precision == "fp32" else torch.Tensor.bfloat16

        def step() -> None:
            with mock.patch.object(torch.Tensor, "bfloat16", cast):
                muon.step()
            adamw.step()

        self.optimizer.step_with_ready_grads = step


class LayerWise(LayerWiseDistributedOptimizer):
    """Megatron-core's layer-wise optimizer, for fp32 weights and over gloo."""

    def __init__(
        self, optimizers: list[Any], config: OptimizerConfig, *args: Any,
        init_state_fn_list: list[Any], **kwargs: Any,
    ) -> None:  # fmt: skip
        pairs = zip(optimizers, init_state_fn_list, strict=True)
        wrapped = [FP32Optimizer(optimizer, config, init) for optimizer, init in pairs]
        super().__init__(wrapped, config, *args, init_state_fn_list=init_state_fn_list, **kwargs)

    def allgather_params(self) -> None:
        if dist.get_backend() != "gloo":
            return super().allgather_params()
        with mock.patch.object(dist, "all_gather", _broadcasts):
            return super().allgather_params()


def _broadcasts(parts: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
    """An all-gather of parts of any sizes; ``parts[own rank]`` is ``mine``."""
    works = [
        dist.broadcast(part, group=group, group_src=rank, async_op=True)
        for rank, part in enumerate(parts)
    ]
    for work in works:
        work.wait()


class LayerWiseEngine(MegatronEngine):
    """Megatron-core's own layer-wise distributed Muon.

    Args:
        precision: the type of Newton-Schulz: ``fp32``, or ``bf16``, which is its default.
        aligned: whether DDP's buffers are laid out for it, which is its default; otherwise
            ``parallel.zero_stage=0`` is needed.
    """

    def __init__(
        self, config: RunConfig, shape: ModelShape, layout: Layout, precision: str,
        aligned: bool = True,
    ) -> None:  # fmt: skip
        assert aligned == (layout.zero_stage == 1)

        def build(
            chunks: list[Any], parameters: Parameters, table: dict[str, TensorSpec],
            optim: OptimSection, *_: Any,
        ) -> Any:  # fmt: skip
            _name_matrices(parameters, table, optim)
            settings = OptimizerConfig(
                optimizer="muon",
                use_layer_wise_distributed_optimizer=True,
                lr=optim.lr,
                weight_decay=optim.weight_decay,
                clip_grad=0.0,
                adam_beta1=optim.beta1,
                adam_beta2=optim.beta2,
                muon_momentum=optim.momentum,
                muon_nesterov=True,
                muon_coefficient_type="simple",  # its name for Jordan's
                muon_num_ns_steps=5,
                muon_fp32_matmul_prec={"fp32": "highest", "bf16": "medium"}[precision],
            )
            with mock.patch.object(megatron_optimizers, "LayerWiseDistributedOptimizer", LayerWise):
                return get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)

        with mock.patch.object(megatron, "build_optimizer", build):
            super().__init__(config, shape, layout)

    def _buffer_layout(self, names: Parameters, buffers: Any) -> Any:
        _name_matrices(names, self._table, self.config.optim)
        parameters = list(names.values())
        tag_params_for_buffer_routing([torch.nn.ParameterList(parameters)])
        return LayerWiseDistributedOptimizer.compute_full_param_layout(
            parameters, None, self.layout.replicas, buffers, self.layout.expert_data
        )


def _name_matrices(
    parameters: Parameters, table: dict[str, TensorSpec], optim: OptimSection
) -> None:
    """Set its mark of what is no matrix for Muon, by our rules. As it comes it has Muon on the
    position embedding and AdamW on the embedding of words."""
    for name, parameter in parameters.items():
        parameter.is_embedding_or_output_parameter = rule_of(table[name], optim) != MUON  # type: ignore[attr-defined]


class DeepSpeedMuonEngine(DeepSpeedEngine):
    """DeepSpeed's own Muon.

    Args:
        method: the method of Newton-Schulz: ``gram``, which is its default, or ``standard``.
    """

    def __init__(self, config: RunConfig, shape: ModelShape, layout: Layout, method: str) -> None:
        optim, start = config.optim, deepspeed_state.start
        params = dict(
            lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay,
            betas=[optim.beta1, optim.beta2], ns_method=method,
            torch_adam=True,  # its own would be compiled, for a minute
        )  # fmt: skip

        def start_own(model: Any, optimizer: Any, settings: dict[str, Any]) -> Any:
            return start(model, None, {**settings, "optimizer": {"type": "Muon", "params": params}})

        with (
            mock.patch.object(deepspeed_state, "start", start_own),
            mock.patch.object(deepspeed_state, "attach"),
        ):
            super().__init__(config, shape, layout)
        self.optimizer = self.engine.optimizer.optimizer


def make_engine(config: RunConfig, system: str, precision: str) -> Any:
    """An engine with the initial weights of seed 1. Collective over all ranks.

    Args:
        system: the name of the arm; a name that is no peer's means our engine.
        precision: the type of a peer's Newton-Schulz.
    """
    shape = model_shape(config)
    layout = make_layout(config.parallel, dist.get_world_size())
    engine: Any
    if system == "torch":
        engine = TorchMuonEngine(config, shape, layout, precision)
    elif system == "deepspeed":
        method = "gram" if precision == "gram" else "standard"
        engine = DeepSpeedMuonEngine(config, shape, layout, method)
    elif system.startswith("megatron"):
        engine = LayerWiseEngine(config, shape, layout, precision, not system.endswith("older"))
    else:
        engine = engines.make_engine(config, shape, layout)
    table, pieces = tensor_table(shape), []
    for name, weight in engine._names.items():
        size = table[name].shape
        pieces.append(Piece(name, PARAM, size, whole(size), weight.data.view(size)))
    initialise_all(ShardedState(pieces), table, 1)
    engine.loaded()
    return engine


def gram_precision() -> str:
    """The type of DeepSpeed's ``gram`` on this machine."""
    deepspeed_state.import_deepspeed()
    from deepspeed.runtime.zero.muon.original_muon import ns_compute_dtype

    return {torch.float16: "fp16", torch.float32: "fp32"}[ns_compute_dtype("gram")]


def optimizer_parts(engine: Any) -> list[tuple[Any, str]]:
    """The pairs (object, method) of everything that is the optimizer's part of an engine's step."""
    if isinstance(engine, DeepSpeedMuonEngine):
        zero = engine.engine.optimizer
        return [(zero, "get_flat_partition"), (zero, "step")]
    return [(engine.optimizer, "step_with_ready_grads")]


def timed(function: Callable[..., Any], add: Callable[[float], None]) -> Callable[..., Any]:
    """The function itself, whose seconds are passed to ``add``."""

    def now() -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()  # when what was launched is done
        return time.perf_counter()

    def call(*args: Any, **kwargs: Any) -> Any:
        started = now()
        try:
            return function(*args, **kwargs)
        finally:
            add(now() - started)

    return call
