"""The sizes of a model in words, for people."""

from __future__ import annotations

from megatron_progressive.models.base import DENSE, MOE, ModelShape, MoE, TransformerShape
from megatron_progressive.models.families.resnet import ResNetShape


def size_words(shape: ModelShape) -> list[str]:
    """The sizes of a model apart from its depth and its experts."""
    if isinstance(shape, ResNetShape):
        return _resnet_words(shape)
    assert isinstance(shape, TransformerShape)
    return _transformer_words(shape)


def input_words(shape: ModelShape) -> tuple[str, str]:
    """What a model reads, as a label and its sizes."""
    if isinstance(shape, ResNetShape):
        pixels = f"{shape.image_size} x {shape.image_size} pixels"
        return "images", f"{pixels}, {shape.num_classes:,} classes"
    assert isinstance(shape, TransformerShape)
    return "vocabulary", f"{shape.vocab_size:,}, padded to {shape.padded_vocab_size:,}"


def size_columns(shape: ModelShape) -> dict[str, str]:
    """The sizes that have a column in a table of models."""
    columns = {"layers": str(shape.num_layers), "width": str(shape.hidden_size)}
    if isinstance(shape, ResNetShape):
        return {**columns, "blocks": _dashed(shape.stage_blocks)}
    assert isinstance(shape, TransformerShape)
    return {**columns, "heads": str(shape.num_attention_heads)}


def expert_words(shape: TransformerShape, moe: MoE) -> list[str]:
    """The experts of a model in words."""
    parts = [f"{moe.num_experts} a layer", f"{moe.top_k} a token", f"ffn {moe.ffn_hidden_size}"]
    parts += [f"{moe.shared_experts} shared"] if moe.shared_experts else []
    if moe.num_groups > 1:
        parts.append(f"from {moe.top_k_groups} of {moe.num_groups} groups")
    kinds = shape.layer_kinds()
    return [*parts, f"in {kinds.count(MOE)} of {len(kinds)} layers"]


def _transformer_words(shape: TransformerShape) -> list[str]:
    mla, heads = shape.mla, shape.num_attention_heads
    parts = [f"hidden {shape.hidden_size}", f"{heads} heads"]
    if mla is not None:
        queries = f"queries through {mla.q_lora_rank}, " if mla.q_lora_rank else ""
        parts[-1] += f" of {mla.qk_nope_head_dim} + {mla.qk_rope_head_dim} rotated"
        parts.append(f"latent attention ({queries}keys and values through {mla.kv_lora_rank})")
    else:
        if shape.head_dim * heads != shape.hidden_size:
            parts[-1] += f" of {shape.head_dim}"
        if shape.num_query_groups != heads:
            parts.append(f"{shape.num_query_groups} query groups")
    if DENSE in shape.layer_kinds() or shape.moe is None:
        parts.append(f"ffn {shape.ffn_hidden_size}")
    parts.append(f"{'tied' if shape.tie_embeddings else 'untied'} embedding")
    if shape.mtp_depth:
        parts.append(f"{shape.mtp_depth} prediction module{'s' * (shape.mtp_depth > 1)}")
    return parts


def _resnet_words(shape: ResNetShape) -> list[str]:
    widths = _dashed([stage.width for stage in shape.layout()])
    parts = shape.resnet
    return [
        f"{parts.block} blocks {_dashed(shape.stage_blocks)}", f"channels {widths}",
        f"{parts.stem} stem", f"norms of {parts.groups} groups",
    ]  # fmt: skip


def _dashed(numbers: list[int]) -> str:
    return "-".join(map(str, numbers))
