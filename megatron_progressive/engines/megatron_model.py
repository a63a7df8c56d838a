"""Megatron-core's own GPTModel for a shape and a layout, and the names of its parameters."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_progressive.models import FAMILIES
from megatron_progressive.models.base import LAYER_PREFIX, ModelShape
from megatron_progressive.runtime.groups import ProcessGroups

TIED_HEAD = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"

# Transformer Engine's spec fuses each norm into the linear behind it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}

# "GPTModel is deprecated" at every build: the layer specs of this release are still its own.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


class CausalAttention(MegatronModule):  # type: ignore[misc]
    """Causal core attention on torch's ``scaled_dot_product_attention``.

    Used with the local spec, in place of Megatron-core's unfused attention (its causal mask
    is S x S per layer and its softmax is written out). Shapes: query [S, B, heads, d], key and
    value [S, B, groups, d]; output [S, B, heads * d].
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = query.size(1) != key.size(1)
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )
        out = out.permute(2, 0, 1, 3)
        return out.reshape(out.size(0), out.size(1), -1)


def transformer_engine_available() -> bool:
    """Whether the fused layers of Transformer Engine can run here."""
    if not torch.cuda.is_available():
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def _untouched(tensor: torch.Tensor) -> torch.Tensor:
    """An init method that leaves the tensor alone: weights come by global name."""
    return tensor


def transformer_config(
    shape: ModelShape, groups: ProcessGroups, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron-core's configuration of one rank's part of the model."""
    layout, cuda = groups.layout, torch.cuda.is_available()
    chunks = layout.chunk_layers(shape.num_layers)
    virtual_stages: list[list[str]] = [
        ["decoder"] * len(stage[chunk])
        for chunk in range(layout.virtual_pipeline)
        for stage in chunks
    ]
    virtual_stages[0].insert(0, "embedding")
    virtual_stages[-1].append("loss")
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        ffn_hidden_size=shape.ffn_hidden_size,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        # it also sets the number of model chunks: virtual stages / stages
        pipeline_model_parallel_layout=virtual_stages if layout.pipeline > 1 else None,  # type: ignore[arg-type]
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        batch_p2p_comm=cuda,
        overlap_p2p_comm=False,
        deallocate_pipeline_outputs=cuda,
        use_cpu_initialization=not cuda,
        perform_initialization=False,
        init_method=_untouched,
        output_layer_init_method=_untouched,  # the default divides by the number of layers
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=cuda,
        persist_layer_norm=False,
        **FAMILIES[shape.family].transformer_config_kwargs(shape),
    )
    if not cuda:
        check_gloo_pipeline(config)
    return config


def check_gloo_pipeline(config: TransformerConfig) -> None:
    """Refuse the pipeline settings that train wrongly over gloo without an error.

    gloo mismatches batched point-to-point calls (under the interleaved schedule a gradient norm
    of 2.06 became 97), and overlapped ones race with the release of a stage's outputs.

    Raises:
        RuntimeError: naming the setting.
    """
    for name in ("batch_p2p_comm", "overlap_p2p_comm"):
        if getattr(config, name):
            raise RuntimeError(f"{name}=True is silently wrong over gloo; it must be False")


def build_chunk(
    shape: ModelShape, groups: ProcessGroups, config: TransformerConfig, chunk: int
) -> GPTModel:
    """One model chunk of this rank, with uninitialised weights."""
    first, last = chunk == 0, chunk == groups.layout.virtual_pipeline - 1
    if transformer_engine_available():
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization=config.normalization)
        spec.submodules.self_attention.submodules.core_attention = CausalAttention
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.sequence_length,
        pre_process=first and groups.first_stage,
        post_process=last and groups.last_stage,
        share_embeddings_and_output_weights=shape.tie_embeddings,
        position_embedding_type=FAMILIES[shape.family].POSITION_EMBEDDING,
        vp_stage=chunk if groups.layout.virtual_pipeline > 1 else None,
    )
    return model.cuda() if torch.cuda.is_available() else model


def canonical_names(model: GPTModel) -> dict[str, torch.nn.Parameter]:
    """The parameters of one model chunk by canonical name.

    The LM head of a tied model on a later stage than the embedding is named
    ``output_layer.weight``: the caller knows that it is a copy.
    """
    named: dict[str, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(LAYER_PREFIX):
            index, rest = name[len(LAYER_PREFIX) :].split(".", 1)
            number = model.decoder.layers[int(index)].layer_number - 1  # theirs is 1-based
            name = f"{LAYER_PREFIX}{number}.{_FUSED_NORMS.get(rest, rest)}"
        named[name] = parameter
    return named
