"""Which kernels a run uses, as ``kernels``, the device and the installed packages decide.

Nothing here has run on a GPU yet. The defaults on CUDA are those of Megatron-core's own training
script, with two exceptions: the fused cross-entropy is Megatron-core's, whose 0.19.2 warns of
Transformer Engine's, and CUDA graphs are off, since an expansion could not replace them. What a run
cannot have is refused in :mod:`.kernel_checks`.

Fused accumulation of weight gradients (``gradient_accumulation_fusion``) is off everywhere, so the
gradient of each micro-batch is rounded to the weights' type before it is added to the fp32 sum, as
on a CPU. Megatron-core 0.19.2 has one switch for Transformer Engine's layers, which have that
kernel, and for its own, among them every head, which are not built without apex's
``fused_weight_gradient_mlp_cuda``. That is a part of NVIDIA's image and of no package index.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from megatron_progressive.config import KernelsSection, OptimSection, RunConfig
from megatron_progressive.models import TRANSFORMERS
from megatron_progressive.models.base import MOE, ModelShape, TransformerShape
from megatron_progressive.optim.coefficients import ns_steps
from megatron_progressive.runtime.layout import Layout


@dataclass(frozen=True)
class Kernels:
    """The kernels that are on; the fields are those of :class:`.config.KernelsSection`."""

    transformer_engine: bool
    """Whether layers are Transformer Engine's; otherwise they are Megatron-core's local ones."""
    cross_entropy: bool = False
    rope: bool = False
    activation: bool = False
    dropout: bool = False
    grouped_gemm: bool = False
    permute: bool = False
    deepep: bool = False
    overlap_gradients: bool = False
    overlap_parameters: bool = False
    cuda_graphs: bool = False
    deterministic: bool = False
    attention: str | None = None
    """A backend of Transformer Engine's; None: whichever it takes."""


def resolve(
    section: KernelsSection,
    shape: TransformerShape,
    *,
    cuda: bool,
    transformer_engine: bool,
    sharded: bool,
    deepep: bool = False,
    fp32: bool = False,
) -> Kernels:
    """The kernels of one engine.

    In fp32 everything is fp32, also on CUDA: Transformer Engine's fp32 products ask for TF32, and
    Megatron-core's fused cross-entropy rounds the gradient of the logits to bf16 whatever the type.

    Args:
        cuda: whether there is a CUDA device; without one all kernels are off.
        transformer_engine: whether layers of Transformer Engine can be used.
        sharded: whether Megatron's distributed optimizer is in use, which has parameters to gather.
        deepep: whether DeepEP is installed, and can serve the layout's experts.
        fp32: whether the run's precision is fp32.
    """
    if not cuda:
        return Kernels(transformer_engine=False)
    fused = transformer_engine and not fp32 and section.transformer_engine is not False
    able = possible(
        section, shape, transformer_engine=fused, sharded=sharded, deepep=deepep, fp32=fp32
    )
    wanted = asdict(section)
    on = {
        name: (name not in _OFF if wanted[name] is None else wanted[name]) and can
        for name, can in able.items()
    }
    return Kernels(attention=section.attention if fused else None, **on)


_OFF = ("cuda_graphs", "deterministic")
"""Kernels that are off by default."""


def possible(
    section: KernelsSection,
    shape: TransformerShape,
    *,
    transformer_engine: bool,
    sharded: bool,
    deepep: bool,
    fp32: bool,
) -> dict[str, bool]:
    """Whether each kernel can be on, on CUDA: for a model that has a use for it, and as
    :func:`resolve` says.

    Args:
        transformer_engine: whether its layers are in use.
    """
    experts = MOE in shape.layer_kinds()
    gated = TRANSFORMERS[shape.family].gated
    return {
        "transformer_engine": transformer_engine,
        # Megatron-core's own script refuses it in its deterministic mode
        "cross_entropy": not fp32 and not section.deterministic,
        # Megatron-core's fused rotation is Transformer Engine's; in latent attention only with yarn
        "rope": transformer_engine
        and shape.rope is not None
        and (shape.mla is None or shape.rope.scaling == "yarn"),
        # its fused GeLU adds the bias
        "activation": gated or shape.linear_bias,
        "dropout": True,
        "grouped_gemm": experts and transformer_engine,
        "permute": experts and transformer_engine,
        # it takes no fp32, and nothing says that it sums in one order
        "deepep": experts and deepep and not fp32 and not section.deterministic,
        "overlap_gradients": sharded,
        "overlap_parameters": sharded,
        # It shares one generator of random numbers, one pool of memory and one registry of graphs
        # over all models of a process; two of which are alive at an expansion.
        "cuda_graphs": False,
        "deterministic": True,
    }


ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""The variables by which Transformer Engine is told which attention it may take."""


def forget_attention() -> None:
    """Leave the choice of an attention to the next model's configuration: Megatron-core writes it
    to the environment, and refuses to where that of a model before it says something else."""
    for name in ATTENTION_VARIABLES:
        os.environ.pop(name, None)


def kernels_here(config: RunConfig, shape: TransformerShape, layout: Layout) -> Kernels:
    """The kernels that :func:`resolve` gives on this machine, which engines build and the command
    line prints."""
    import torch

    from megatron_progressive.engines.megatron.spec import (
        deepep_available,
        transformer_engine_available,
    )

    return resolve(
        config.kernels,
        shape,
        cuda=torch.cuda.is_available(),
        transformer_engine=transformer_engine_available(),
        sharded=layout.distributed_optimizer,
        deepep=layout.can_use_deepep and deepep_available(),
        fp32=config.train.precision == "fp32",
    )


def transformer_kwargs(kernels: Kernels, shape: TransformerShape) -> dict[str, Any]:
    """The fields of Megatron-core's ``TransformerConfig`` that kernels decide."""
    import torch.nn.functional as F
    from megatron.core.transformer.enums import AttnBackend

    values: dict[str, Any] = dict(
        cross_entropy_loss_fusion=kernels.cross_entropy,
        cross_entropy_fusion_impl="native",
        apply_rope_fusion=kernels.rope,
        bias_activation_fusion=kernels.activation,
        bias_dropout_fusion=kernels.dropout,
        moe_grouped_gemm=kernels.grouped_gemm,
        moe_permute_fusion=kernels.permute,
        cuda_graph_impl="none",
        deterministic_mode=kernels.deterministic,
        attention_backend=AttnBackend[kernels.attention or "auto"],
    )
    if kernels.deepep:
        values |= dict(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep")
    if kernels.activation and not TRANSFORMERS[shape.family].gated:
        values["activation_func"] = F.gelu  # it asks for this name; its kernel is the tanh form
    return values


def optimizer_text(optim: OptimSection, dtype: str, cuda: bool = False) -> str:
    """The optimizer in a few words.

    Args:
        dtype: the type that Newton-Schulz computes in.
        cuda: whether it computes on a CUDA device, where it may use our symmetric kernel.
    """
    if optim.name == "adamw":
        return "AdamW"
    symmetric = ""
    if cuda and optim.ns_kernel_from is not None:
        symmetric = f", our symmetric kernel from {optim.ns_kernel_from}"
    steps = f"{ns_steps(optim)} {optim.ns_coefficients} steps in {dtype}{symmetric}"
    embeddings = (
        "" if optim.embeddings == "muon" else f", {_RULES[optim.embeddings]} for embeddings"
    )
    return f"Muon-NSGD ({steps}{embeddings})"


_RULES = {"adamw": "AdamW", "nsgd": "NSGD"}


def kernels_line(config: RunConfig, shape: ModelShape, layout: Layout) -> str:
    """One line for people that says which kernels a run uses on this machine."""
    import torch

    from megatron_progressive.optim.newton_schulz import DTYPES, compute_dtype

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = compute_dtype(config.optim, device)
    name = next(name for name, value in DTYPES.items() if value == dtype)
    if not isinstance(shape, TransformerShape):
        return f"kernels: torch's own, {optimizer_text(config.optim, name, cuda)}"
    return summary(kernels_here(config, shape, layout), config.optim, name, cuda)


_NAMED = ("transformer_engine", "cross_entropy", "grouped_gemm", "deepep", "deterministic")
"""What the line says in words of its own."""


def summary(kernels: Kernels, optim: OptimSection, dtype: str, cuda: bool = False) -> str:
    """These kernels in the words of :func:`kernels_line`."""
    te = kernels.transformer_engine
    fused = [name for name, on in asdict(kernels).items() if on is True and name not in _NAMED]
    return ", ".join(
        [
            "kernels: " + ("Transformer Engine" if te else "local") + " layers",
            ("Transformer Engine's" if te else "torch's")
            + (f" {kernels.attention}" if kernels.attention else "")
            + " attention",
            ("fused" if kernels.cross_entropy else "plain") + " cross-entropy",
            *(["grouped GEMM"] if kernels.grouped_gemm else []),
            *(["DeepEP"] if kernels.deepep else []),
            *(["deterministic"] if kernels.deterministic else []),
            optimizer_text(optim, dtype, cuda),
            "fused or overlapped: " + (", ".join(fused) or "none"),
        ]
    )
