"""Megatron-core's own GPTModel for a shape and a layout, and the names of its parameters."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

from megatron_progressive.engines.megatron.context import weigh_predictions_evenly
from megatron_progressive.engines.megatron.kernels import (
    Kernels,
    forget_attention,
    transformer_kwargs,
)
from megatron_progressive.engines.megatron.spec import (
    TRANSFORMER_ENGINE,
    decoder_spec,
    mtp_spec,
)
from megatron_progressive.engines.megatron.transformer_kwargs import transformer_config_kwargs
from megatron_progressive.models import TRANSFORMERS
from megatron_progressive.models.base import LAYER_PREFIX, MOE, TensorSpec, TransformerShape
from megatron_progressive.models.tensor_table import MTP_PREFIX
from megatron_progressive.runtime.groups import ProcessGroups
from megatron_progressive.runtime.layout import Layout

TIED_HEAD = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"

# Transformer Engine's spec fuses each norm into the linear behind it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.(.*)")
_GROUPED_EXPERT = re.compile(r"experts\.(linear_fc[12])\.weight(\d+)")

# "GPTModel is deprecated" at every build: the layer specs of this release are still its own.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


def _untouched(tensor: torch.Tensor) -> torch.Tensor:
    """Leave a tensor as it is, as an init method: weights are set by global name."""
    return tensor


def transformer_config(
    shape: TransformerShape, groups: ProcessGroups, dtype: torch.dtype, kernels: Kernels
) -> TransformerConfig:
    """Megatron-core's configuration of one rank's part of the model."""
    forget_attention()
    layout, cuda = groups.layout, torch.cuda.is_available()
    chunks = layout.chunk_layers(shape.num_layers)
    virtual_stages: list[list[str]] = [
        ["decoder"] * len(stage[chunk])
        for chunk in range(layout.virtual_pipeline)
        for stage in chunks
    ]
    virtual_stages[0].insert(0, "embedding")
    virtual_stages[-1] += ["mtp"] * shape.mtp_depth + ["loss"]
    experts = MOE in shape.layer_kinds()
    kind = TransformerConfig if shape.mla is None else MLATransformerConfig
    config = kind(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        # a model that has no experts yet has no use for their groups
        expert_model_parallel_size=layout.expert if experts else 1,
        expert_tensor_parallel_size=layout.expert_tensor if experts else None,
        sequence_parallel=layout.divides_sequence(shape.sequence_length),
        # it also sets the number of model chunks: virtual stages / stages
        pipeline_model_parallel_layout=virtual_stages if layout.pipeline > 1 else None,  # type: ignore[arg-type]
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        batch_p2p_comm=cuda and not _both_neighbours_are_one(layout),
        overlap_p2p_comm=False,
        deallocate_pipeline_outputs=cuda,
        use_cpu_initialization=not cuda,
        perform_initialization=False,
        transformer_impl=TRANSFORMER_ENGINE if kernels.transformer_engine else "local",
        init_method=_untouched,
        output_layer_init_method=_untouched,  # the default divides by the number of layers
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **_recompute_kwargs(shape, layout),
        **{**transformer_config_kwargs(shape), **transformer_kwargs(kernels, shape)},
    )
    if not cuda:
        check_gloo_pipeline(config)
    return config


def _recompute_kwargs(shape: TransformerShape, layout: Layout) -> dict[str, Any]:
    """The fields of what the backward pass computes anew."""
    if layout.recompute == "full":
        # Megatron-core counts the layers of each model chunk, and takes all where there are fewer
        some = layout.recompute_layers
        return dict(
            recompute_granularity="full",
            recompute_method="uniform" if some is None else "block",
            recompute_num_layers=some or 1,
        )
    modules = set(layout.recompute_modules) & shape.recomputable()
    if layout.recompute == "none" or not modules:
        return {}
    return dict(recompute_granularity="selective", recompute_modules=sorted(modules))


def _both_neighbours_are_one(layout: Layout) -> bool:
    """Whether the stages before and after a rank's are the same rank's, which sends to it and
    receives from it in both directions at once: two stages under the interleaved schedule.

    NCCL pairs the messages of two ranks in the order of issue. Megatron-core's batched calls
    (0.19.2: ``_batched_p2p_ops``) issue "to the stage before" first on both sides, so that each
    would take a gradient for an activation. Its single calls keep the directions in two groups.
    """
    return layout.pipeline == 2 and layout.virtual_pipeline > 1


def check_gloo_pipeline(config: TransformerConfig) -> None:
    """Refuse the pipeline settings that train wrongly over gloo without an error.

    gloo mismatches batched point-to-point calls (under the interleaved schedule a gradient norm of
    2.06 became 97), and overlapped calls race with the release of a stage's outputs.

    Raises:
        RuntimeError: such a setting is on; the error names it.
    """
    for name in ("batch_p2p_comm", "overlap_p2p_comm"):
        if getattr(config, name):
            raise RuntimeError(f"{name}=True is silently wrong over gloo; it must be False")


def build_chunk(
    shape: TransformerShape, groups: ProcessGroups, config: TransformerConfig, chunk: int
) -> GPTModel:
    """One model chunk of this rank, whose weights are uninitialised."""
    layout, family = groups.layout, TRANSFORMERS[shape.family]
    first = chunk == 0 and groups.first_stage
    last = chunk == layout.virtual_pipeline - 1 and groups.last_stage
    numbers = layout.chunk_layers(shape.num_layers)[groups.pipeline_rank][chunk]
    kinds = shape.layer_kinds()
    if last and shape.mtp_depth and layout.context > 1:
        weigh_predictions_evenly()
    rope: dict[str, Any] = {}
    if shape.rope is not None:
        rope = dict(
            rotary_base=shape.rope.theta,
            rope_scaling=shape.rope.scaling == "llama3",
            rope_scaling_factor=shape.rope.factor,
        )
    model = GPTModel(
        config=config,
        transformer_layer_spec=decoder_spec(config, [kinds[number] for number in numbers]),
        mtp_block_spec=mtp_spec(config, kinds[-1], shape.mtp_depth)
        if last and shape.mtp_depth
        else None,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.sequence_length,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=shape.tie_embeddings,
        position_embedding_type="learned_absolute" if family.learned_positions else "rope",
        vp_stage=chunk if layout.virtual_pipeline > 1 else None,
        **rope,
    )
    if last and not first and shape.mtp_depth and shape.tie_embeddings:
        # The head computes with the embedding that multi-token prediction has on this stage; the
        # weight that was made for it would never be used.
        model.output_layer.weight = None
    if last and shape.vocab_size < shape.padded_vocab_size:
        _mask_padding(model.output_layer, shape, groups.tensor_rank, layout.tensor)
    if config.add_bias_linear and "mlp" in recomputed_parts(config):
        _give_biases_as_views(model)
    return model.cuda() if torch.cuda.is_available() else model


def recomputed_parts(config: TransformerConfig) -> list[str]:
    """The parts of each layer that the backward pass computes anew."""
    selective = config.recompute_granularity == "selective"
    return list(config.recompute_modules or ()) if selective else []


def _give_biases_as_views(model: torch.nn.Module) -> None:
    """Let MLPs with biases be computed anew: the second bias goes out unused, to be added later,
    and a parameter that goes out of an autograd function becomes a result of that function, which
    then calls itself without end (0.19.2: ``CheckpointFunction``)."""

    def give_view(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        hidden, bias = output
        return hidden, bias.view_as(bias)

    for module in model.modules():
        if isinstance(module, MLP):
            module.register_forward_hook(give_view)


def _mask_padding(
    output_layer: torch.nn.Module, shape: TransformerShape, tensor_rank: int, tensor_ranks: int
) -> None:
    """Give the padding of the vocabulary logits of -infinity: it takes no part in the softmax, and
    its rows get no gradient."""
    columns = shape.padded_vocab_size // tensor_ranks
    live = max(0, shape.vocab_size - columns * tensor_rank)

    def mask(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        output[0][..., live:] = -torch.inf
        return output

    if live < columns:
        output_layer.register_forward_hook(mask)


def engine_table(table: dict[str, TensorSpec], transformer_engine: bool) -> dict[str, TensorSpec]:
    """The family's table as it holds for the layer spec in use.

    Transformer Engine's spec keeps latent attention's down-projections whole on every
    tensor-parallel rank.
    """
    if not transformer_engine:
        return table
    down = {name for name, spec in table.items() if spec.role in ("q_down", "kv_down")}
    whole = {name: dataclasses.replace(table[name], tp_axis=None) for name in down}
    return {**table, **whole}


def canonical_names(model: GPTModel, groups: ProcessGroups) -> dict[str, torch.nn.Parameter]:
    """The parameters of one model chunk by canonical name.

    The LM head of a tied model that lies on a later stage than the embedding is named
    ``output_layer.weight``; the caller knows that it is a copy.
    """
    return {
        _canonical_name(name, model, groups): parameter
        for name, parameter in model.named_parameters()
    }


def canonical_buffers(model: GPTModel, groups: ProcessGroups) -> dict[str, torch.Tensor]:
    """The tensors of one model chunk that training changes and the optimizer does not have, which
    are the routers' expert biases.

    The biases become fp32 here, as the router makes them at its first use. So do the counts of
    tokens that they follow: Megatron-core leaves these in the type of the weights, and bf16 counts
    no further than 256.
    """
    named = {}
    for name, buffer in model.named_buffers():
        if name.endswith(".router.local_tokens_per_expert"):
            buffer.data = buffer.data.float()
        if name.endswith(".router.expert_bias"):
            buffer.data = buffer.data.float()
            named[_canonical_name(name, model, groups)] = buffer
    return named


def _canonical_name(name: str, model: GPTModel, groups: ProcessGroups) -> str:
    if name.startswith(LAYER_PREFIX):
        index, rest = name[len(LAYER_PREFIX) :].split(".", 1)
        number = model.decoder.layers[int(index)].layer_number - 1  # theirs is 1-based
        prefix = f"{LAYER_PREFIX}{number}."
    elif name.startswith(MTP_PREFIX):
        prefix, middle, rest = name.partition(".mtp_model_layer.")
        if not middle:
            return name
        prefix += middle
    else:
        return name
    for fused, norm in _FUSED_NORMS.items():
        rest = rest.replace(fused, norm)
    return prefix + _global_expert(rest, model.config, groups)


def _global_expert(name: str, config: TransformerConfig, groups: ProcessGroups) -> str:
    """A parameter's name with the global number of its expert; Megatron-core numbers the experts of
    each rank on their own."""

    def number(local: str) -> int:
        assert config.num_moe_experts is not None
        each = config.num_moe_experts // groups.layout.expert
        first: int = groups.expert_rank * each
        return first + int(local)

    name = _EXPERT.sub(lambda m: f"experts.{number(m[1])}.{m[2]}", name)
    return _GROUPED_EXPERT.sub(lambda m: f"experts.{number(m[2])}.{m[1]}.weight", name)


def forget_graph(model: torch.nn.Module) -> None:
    """Drop what token dispatchers keep of the last forward pass. The autograd graph of that pass
    holds the parameters, and these hold the model by their hooks, which is a cycle that Python
    cannot see."""
    for module in model.modules():
        dispatcher = getattr(module, "token_dispatcher", None)
        for holder in (dispatcher, getattr(dispatcher, "_comm_manager", None)):  # DeepEP's
            for name, value in vars(holder).items() if holder is not None else ():
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    setattr(holder, name, None)
