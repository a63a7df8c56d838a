"""Layer specs: Transformer Engine's on CUDA (in bf16), Megatron-core's local one elsewhere.

The local spec of 0.19.2 lacks what latent attention and experts need: a core attention that takes
heads of two widths, and norms that support sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_progressive.models.base import MOE

TRANSFORMER_ENGINE = "transformer_engine"
"""``TransformerConfig.transformer_impl`` of models with Transformer Engine's layers."""


class CausalAttention(MegatronModule):  # type: ignore[misc]
    """Causal core attention on torch's ``scaled_dot_product_attention``, of all tokens or within a
    mask (:mod:`.inputs`).

    It is used with the local spec, in place of Megatron-core's unfused attention, whose causal mask
    is S x S for each layer and whose softmax is written out. Shapes: query [S, B, heads, d], key
    [S, B, groups, d], value [S, B, groups, v]; output [S, B, heads * v].

    Under context parallelism S is that of this rank's part of the sequence. Keys and values of all
    parts are gathered, in the order of ranks, and a mask in that order says which of them come
    before each query (:meth:`.SequencePart.mask`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None = None, *_: Any, **__: Any,
    ) -> torch.Tensor:  # fmt: skip
        if self.context_group is not None:
            # its gradient is summed over the ranks and divided among them
            key, value = (
                gather_from_sequence_parallel_region(part.contiguous(), group=self.context_group)
                for part in (key, value)
            )
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = query.size(1) != key.size(1)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None,
            scale=self.softmax_scale, enable_gqa=grouped,
        )  # fmt: skip
        out = out.permute(2, 0, 1, 3)
        return out.reshape(out.size(0), out.size(1), -1)


class LatentAttention(MLASelfAttention):  # type: ignore[misc]
    """Latent attention in which three things of Megatron-core 0.19.2 are set right.

    Under tensor parallelism the rotated part of the keys gets its whole gradient. All heads share
    that part; with the local spec it is gathered from the ranks that each project some of it, and
    the gradient that goes back is that of each rank's own heads alone
    (``multi_latent_attention.py``: the gather's backward pass only splits).

    Norms are where the spec has them. Where queries are not compressed, ``mla_qk_norm_config.py``
    asks for one more norm, of the queries' input, which DeepSeek-V3 does not have.

    The norm of compressed queries is whole on every tensor-parallel rank, and so is its gradient
    without sequence parallelism: it must not be summed, unlike the gradient of norms per head,
    which ``finalize_model_grads.py`` knows by the same name.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.q_lora_rank and not config.sequence_parallel:
            for parameter in self.q_layernorm.parameters():  # of equal ones: leaves them
                parameter.average_gradients_across_tp_domain = True

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        norms = ("q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in (*names, *norms)}

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[Any, torch.Tensor]:
        queries, latent = super()._qkv_down_projection(hidden_states)
        width, rotated = self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim
        if latent.size(-1) == width + rotated:
            return queries, latent
        latent = gather_from_tensor_model_parallel_region(latent)
        if self.config.sequence_parallel:
            # the base class gathers the rotated part again, and sums its gradient as it does
            return queries, scatter_to_sequence_parallel_region(latent)
        compressed, keys = torch.split(latent, [width, rotated], dim=-1)
        keys = copy_to_tensor_model_parallel_region(keys)  # sums its gradient
        return queries, torch.cat([compressed, keys], dim=-1)


def local_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
) -> torch.nn.Module:
    """Torch's LayerNorm or RMSNorm, with the mark by which Megatron-core adds up the gradients of a
    norm that each tensor-parallel rank applies to its part of the sequence."""
    kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
    norm = kind(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def transformer_engine_available() -> bool:
    """Whether the fused layers of Transformer Engine can run here."""
    if not torch.cuda.is_available():
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def deepep_available() -> bool:
    """Whether Megatron-core found DeepEP (the package ``deep_ep``)."""
    from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP

    return bool(HAVE_DEEP_EP)


def layer_spec(config: TransformerConfig, kind: str) -> ModuleSpec:
    """The spec of one layer, which is ``dense`` or ``moe``."""
    common: dict[str, Any] = dict(
        num_experts=config.num_moe_experts if kind == MOE else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    fused = config.transformer_impl == TRANSFORMER_ENGINE
    if fused:
        grouped = config.moe_grouped_gemm and kind == MOE
        spec = get_gpt_layer_with_transformer_engine_spec(moe_grouped_gemm=grouped, **common)
    else:
        spec = get_gpt_layer_local_spec(normalization=config.normalization, **common)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    if config.multi_latent_attention:
        layer.self_attention.module = LatentAttention
    if fused:
        return spec
    attention.core_attention = CausalAttention
    layer.input_layernorm = layer.pre_mlp_layernorm = local_norm
    norms: list[str] = []
    if config.multi_latent_attention:
        norms = ["kv_layernorm", *(["q_layernorm"] if config.q_lora_rank else [])]
        attention.q_layernorm = IdentityOp
    elif config.qk_layernorm:
        norms = ["q_layernorm", "k_layernorm"]
    for name in norms:
        setattr(attention, name, local_norm)
    return spec


def decoder_spec(config: TransformerConfig, kinds: Sequence[str]) -> TransformerBlockSubmodules:
    """The spec of layers of these kinds and of the norm behind them."""
    if config.transformer_impl == TRANSFORMER_ENGINE:
        from megatron.core.extensions.transformer_engine import TENorm

        norm: Any = TENorm
    else:
        norm = local_norm
    specs = {kind: layer_spec(config, kind) for kind in set(kinds)}
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in kinds], layer_norm=norm)


def mtp_spec(
    config: TransformerConfig, kind: str, depth: int
) -> MultiTokenPredictionBlockSubmodules:
    """The spec of ``depth`` multi-token prediction modules whose layers are of this kind."""
    fused = config.transformer_impl == TRANSFORMER_ENGINE
    if fused:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend: Any = TESpecProvider()
    else:
        backend = LocalSpecProvider()
    spec = get_mtp_layer_spec_for_backend(layer_spec(config, kind), backend)
    if not fused:
        for name in ("enorm", "hnorm", "layer_norm"):
            setattr(spec.submodules, name, local_norm)
    return MultiTokenPredictionBlockSubmodules(layer_specs=[spec] * depth)
