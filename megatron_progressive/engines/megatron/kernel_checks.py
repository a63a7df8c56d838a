"""Refusals of kernels that a run, or the machine that it is on, cannot have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, fields

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.engines.megatron.kernels import (
    ATTENTION_VARIABLES,
    kernels_here,
    possible,
)
from megatron_progressive.models import TRANSFORMERS
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.runtime.environment import (
    BUILT_FOR_THIS_TORCH,
    unusable_transformer_engine,
    version_of,
)
from megatron_progressive.runtime.layout import Layout

_WHY = {
    "transformer_engine": "is of bf16 alone (its fp32 products are TF32)",
    "cross_entropy": "is of bf16 alone, and not deterministic",
    "rope": "rotates positions (in latent attention those of yarn) in Transformer Engine's layers",
    "activation": "adds the bias of a linear layer or multiplies by a gate, which this model lacks",
    "grouped_gemm": "multiplies experts in Transformer Engine's layers",
    "permute": "permutes tokens to experts in Transformer Engine's layers",
    "deepep": "sends tokens to experts on several ranks (parallel.expert above 1: up to 8, or a "
    "multiple of 8), in bf16, and not deterministically",
    "overlap_gradients": "is of Megatron's distributed optimizer (parallel.engine: megatron, "
    "parallel.zero_stage: 1) alone",
    "overlap_parameters": "is of Megatron's distributed optimizer (parallel.engine: megatron, "
    "parallel.zero_stage: 1) alone",
    "cuda_graphs": "an expansion cannot replace: in Megatron-core 0.19.2 graphs, their memory and "
    "their random numbers belong to the process",
}
"""What a kernel needs that a run may lack, behind the word `which`."""


def check_possible(
    config: RunConfig,
    phases: Sequence[tuple[TransformerShape, Layout]],
    *,
    transformer_engine: bool = True,
) -> None:
    """Refuse kernels that no phase of a run could use.

    Args:
        phases: the model and the layout of each.
        transformer_engine: whether its layers can be used where the run is to be trained.

    Raises:
        ConfigError: one is set to true.
    """
    section, fp32 = config.kernels, config.train.precision == "fp32"
    fused = transformer_engine and not fp32 and section.transformer_engine is not False
    able = [
        possible(
            section,
            shape,
            transformer_engine=fused,
            sharded=layout.distributed_optimizer,
            deepep=layout.can_use_deepep,
            fp32=fp32,
        )
        for shape, layout in phases
    ]
    for name, value in asdict(section).items():
        if value is True and phases and not any(phase[name] for phase in able):
            why = _WHY[name]
            if name == "transformer_engine" and not fp32:
                why = "is not installed here"
            raise ConfigError(f"kernels.{name}: got true, which {why}; accepted: false, or nothing")
    if section.attention is not None and not fused:
        raise ConfigError(
            f"kernels.attention: got {section.attention}, which is of Transformer Engine's layers "
            "alone (bf16 on CUDA); accepted: nothing"
        )


def check_kernels(
    config: RunConfig, phases: Sequence[tuple[TransformerShape, Layout]] = ()
) -> None:
    """Refuse kernels that this machine cannot run.

    Args:
        phases: the model and the layout of each phase, of a language model.

    Raises:
        ConfigError: a kernel is set to true and there is no CUDA device, or the model is a language
            model and the installed Transformer Engine cannot be imported.
    """
    unusable = unusable_transformer_engine() if config.model.family in TRANSFORMERS else None
    if unusable is not None:
        raise ConfigError(f"transformer-engine: got {unusable}; accepted: {BUILT_FOR_THIS_TORCH}")
    for name in ATTENTION_VARIABLES:
        if os.environ.get(name) == "0":  # Megatron-core would fail an assertion
            raise ConfigError(
                f"environment: got {name}=0; accepted: without it (kernels.attention: flash, fused "
                "or unfused)"
            )
    if any("moe_act" in layout.recompute_modules for _, layout in phases):
        _check_grouped_experts(config, phases)
    asked = [f.name for f in fields(config.kernels) if getattr(config.kernels, f.name)]
    asked = [f"kernels.{name}" for name in asked]
    if config.optim.ns_kernel_from is not None:
        asked.append("optim.ns_kernel_from")
    if not asked:
        return
    import torch

    if not torch.cuda.is_available():
        section, name = asked[0].split(".")
        got = getattr(getattr(config, section), name)
        raise ConfigError(
            f"{asked[0]}: got {str(got).lower()} without a CUDA device; accepted: "
            + ("false, or nothing" if got is True else "nothing")
        )
    if config.kernels.deepep:
        from megatron_progressive.engines.megatron.spec import deepep_available

        if not deepep_available():
            raise ConfigError(
                "kernels.deepep: got true, and deep_ep is not installed here; accepted: false, or "
                "nothing"
            )
    if phases:
        check_possible(
            config, phases, transformer_engine=version_of("transformer-engine") is not None
        )


def _check_grouped_experts(
    config: RunConfig, phases: Sequence[tuple[TransformerShape, Layout]]
) -> None:
    """Refuse to compute the activation of experts anew where they do not run grouped."""
    for shape, layout in phases:
        wanted = "moe_act" in layout.recompute_modules and "moe_act" in shape.recomputable()
        if wanted and not kernels_here(config, shape, layout).grouped_gemm:
            raise ConfigError(
                "parallel.recompute_modules: got moe_act, which needs Transformer Engine's grouped "
                "experts (bf16 on CUDA, kernels.grouped_gemm); accepted here: the other parts"
            )
