"""Which kernels a run uses, as ``kernels``, the device and the installed packages decide.

Nothing here has run on a GPU yet. The defaults on CUDA are those of Megatron-core's own training
script, with two exceptions: the fused cross-entropy is Megatron-core's, whose 0.19.2 warns of
Transformer Engine's, and CUDA graphs are off, since each expansion has to capture them anew.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_progressive.config import ConfigError, KernelsSection, OptimSection, RunConfig
from megatron_progressive.models import TRANSFORMERS
from megatron_progressive.models.base import MOE, ModelShape, TransformerShape
from megatron_progressive.optim.coefficients import ns_steps
from megatron_progressive.runtime.environment import (
    BUILT_FOR_THIS_TORCH,
    unusable_transformer_engine,
)
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
    overlap_gradients: bool = False
    overlap_parameters: bool = False
    cuda_graphs: bool = False


def resolve(
    section: KernelsSection,
    shape: TransformerShape,
    *,
    cuda: bool,
    transformer_engine: bool,
    sharded: bool,
    fp32: bool = False,
) -> Kernels:
    """The kernels of one engine.

    In fp32 everything is fp32, also on CUDA: Transformer Engine's fp32 products ask for TF32, and
    Megatron-core's fused cross-entropy rounds the gradient of the logits to bf16 whatever the type.

    Args:
        cuda: whether there is a CUDA device; without one all kernels are off.
        transformer_engine: whether layers of Transformer Engine can be used.
        sharded: whether Megatron's distributed optimizer is in use, which has parameters to gather.
        fp32: whether the run's precision is fp32.
    """
    if not cuda:
        return Kernels(transformer_engine=False)
    transformer_engine = transformer_engine and not fp32
    able = possible(shape, transformer_engine=transformer_engine, sharded=sharded, fp32=fp32)
    default = {name: name != "cuda_graphs" for name in able}
    wanted = asdict(section)
    on = {
        name: (default[name] if wanted[name] is None else wanted[name]) and can
        for name, can in able.items()
    }
    return Kernels(transformer_engine=transformer_engine, **on)


def possible(
    shape: TransformerShape, *, transformer_engine: bool, sharded: bool, fp32: bool
) -> dict[str, bool]:
    """Whether each kernel can be on, on CUDA: for a model that has a use for it, and as
    :func:`resolve` says."""
    experts = MOE in shape.layer_kinds()
    gated = TRANSFORMERS[shape.family].gated
    return {
        "cross_entropy": not fp32,
        # Megatron-core's fused rotation is Transformer Engine's; in latent attention only with yarn
        "rope": transformer_engine
        and shape.rope is not None
        and (shape.mla is None or shape.rope.scaling == "yarn"),
        # its fused GeLU adds the bias
        "activation": gated or shape.linear_bias,
        "dropout": True,
        "grouped_gemm": experts and transformer_engine,
        "permute": experts and transformer_engine,
        "overlap_gradients": sharded,
        "overlap_parameters": sharded,
        "cuda_graphs": True,
    }


def kernels_here(config: RunConfig, shape: TransformerShape, layout: Layout) -> Kernels:
    """The kernels that :func:`resolve` gives on this machine, which engines build and the command
    line prints."""
    import torch

    from megatron_progressive.engines.megatron.spec import transformer_engine_available

    return resolve(
        config.kernels,
        shape,
        cuda=torch.cuda.is_available(),
        transformer_engine=transformer_engine_available(),
        sharded=layout.distributed_optimizer,
        fp32=config.train.precision == "fp32",
    )


def transformer_kwargs(kernels: Kernels, shape: TransformerShape) -> dict[str, Any]:
    """The fields of Megatron-core's ``TransformerConfig`` that kernels decide."""
    import torch.nn.functional as F

    values: dict[str, Any] = dict(
        cross_entropy_loss_fusion=kernels.cross_entropy,
        cross_entropy_fusion_impl="native",
        apply_rope_fusion=kernels.rope,
        bias_activation_fusion=kernels.activation,
        bias_dropout_fusion=kernels.dropout,
        moe_grouped_gemm=kernels.grouped_gemm,
        moe_permute_fusion=kernels.permute,
        cuda_graph_impl="local" if kernels.cuda_graphs else "none",
    )
    if kernels.activation and not TRANSFORMERS[shape.family].gated:
        values["activation_func"] = F.gelu  # it asks for this name; its kernel is the tanh form
    return values


def check_kernels(config: RunConfig) -> None:
    """Refuse kernels that this machine cannot run.

    Raises:
        ConfigError: a kernel is set to true and there is no CUDA device, or the model is a language
            model and the installed Transformer Engine cannot be imported.
    """
    unusable = unusable_transformer_engine() if config.model.family in TRANSFORMERS else None
    if unusable is not None:
        raise ConfigError(f"transformer-engine: got {unusable}; accepted: {BUILT_FOR_THIS_TORCH}")
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
            + ("false, or nothing" if section == "kernels" else "nothing")
        )


def optimizer_text(optim: OptimSection, dtype: str) -> str:
    """The optimizer in a few words."""
    if optim.name == "adamw":
        return "AdamW"
    return f"Muon-NSGD ({ns_steps(optim)} {optim.ns_coefficients} steps in {dtype})"


def kernels_line(config: RunConfig, shape: ModelShape, layout: Layout) -> str:
    """One line for people that says which kernels a run uses on this machine."""
    import torch

    from megatron_progressive.optim.newton_schulz import DTYPES, compute_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(config.optim, device)
    name = next(name for name, value in DTYPES.items() if value == dtype)
    if not isinstance(shape, TransformerShape):
        return f"kernels: torch's own, {optimizer_text(config.optim, name)}"
    return summary(kernels_here(config, shape, layout), config.optim, name)


def summary(kernels: Kernels, optim: OptimSection, dtype: str) -> str:
    """These kernels in the words of :func:`kernels_line`."""
    te = kernels.transformer_engine
    fused = [
        name
        for name, on in asdict(kernels).items()
        if on and name not in ("transformer_engine", "cross_entropy", "grouped_gemm")
    ]
    return ", ".join(
        [
            "kernels: " + ("Transformer Engine" if te else "local") + " layers",
            ("Transformer Engine's" if te else "torch's") + " attention",
            ("fused" if kernels.cross_entropy else "plain") + " cross-entropy",
            *(["grouped GEMM"] if kernels.grouped_gemm else []),
            optimizer_text(optim, dtype),
            "fused or overlapped: " + (", ".join(fused) or "none"),
        ]
    )
