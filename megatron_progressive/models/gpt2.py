"""GPT-2: learned positions, LayerNorm, GeLU, full attention, tied or untied embedding."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_progressive.models.base import LAYER_PREFIX, ModelShape, TensorSpec, spectral_std

EMBEDDING_STD = 0.02  # GPT-2's own (Radford et al. 2019); layers use the spectral condition

PRESETS: dict[str, dict[str, int]] = {
    "tiny": dict(
        num_layers=6, hidden_size=64, num_attention_heads=4, ffn_hidden_size=256,
        vocab_size=2048, sequence_length=128,
    ),
    "124m": dict(
        num_layers=12, hidden_size=768, num_attention_heads=12, ffn_hidden_size=3072,
        vocab_size=50257, sequence_length=1024,
    ),
    "7b": dict(
        num_layers=60, hidden_size=3072, num_attention_heads=24, ffn_hidden_size=12288,
        vocab_size=50257, sequence_length=1024,
    ),
}  # fmt: skip


def tensors(shape: ModelShape) -> dict[str, TensorSpec]:
    """Every global tensor of the model, by canonical name, in forward order."""
    h, ffn, vocab = shape.hidden_size, shape.ffn_hidden_size, shape.padded_vocab_size
    head = h // shape.num_attention_heads
    table = {
        "embedding.word_embeddings.weight": TensorSpec(
            (vocab, h), "embedding", "normal", EMBEDDING_STD, tp_axis=0
        ),
        "embedding.position_embeddings.weight": TensorSpec(
            (shape.sequence_length, h), "position", "normal", EMBEDDING_STD
        ),
    }

    def norm(name: str) -> None:
        table[f"{name}.weight"] = TensorSpec((h,), "norm_gain", "ones")
        table[f"{name}.bias"] = TensorSpec((h,), "norm_bias", "zeros")

    def linear(name: str, role: str, n_out: int, n_in: int, column: bool, **more: Any) -> None:
        """Column-parallel linears are cut along the output, row-parallel along the input.

        The latter write to the residual stream, 2 L of them: GPT-2 scales their initial values
        by 1/sqrt(2 L) (Radford et al. 2019, section 2.3). New layers at τ take the target's L.
        """
        std = spectral_std(n_out, n_in) * (1.0 if column else (2 * shape.num_layers) ** -0.5)
        table[f"{name}.weight"] = TensorSpec(
            (n_out, n_in), role, "normal", std,
            tp_axis=0 if column else 1, last_linear=not column, **more,
        )  # fmt: skip
        if shape.linear_bias:
            table[f"{name}.bias"] = TensorSpec(
                (n_out,), "bias", "zeros", tp_axis=0 if column else None, last_linear=not column
            )

    for number in range(shape.num_layers):
        layer = f"{LAYER_PREFIX}{number}"
        norm(f"{layer}.input_layernorm")
        attention = f"{layer}.self_attention"
        linear(f"{attention}.linear_qkv", "qkv", 3 * h, h, True, row_blocks=(head, head, head))
        linear(f"{attention}.linear_proj", "proj", h, h, False)
        norm(f"{layer}.pre_mlp_layernorm")
        linear(f"{layer}.mlp.linear_fc1", "fc1", ffn, h, True)
        linear(f"{layer}.mlp.linear_fc2", "fc2", h, ffn, False)
    norm("decoder.final_layernorm")
    if not shape.tie_embeddings:
        table["output_layer.weight"] = TensorSpec(
            (vocab, h), "head", "normal", EMBEDDING_STD, tp_axis=0
        )
    return table


def transformer_config_kwargs(shape: ModelShape) -> dict[str, Any]:
    """The family's part of Megatron-core's ``TransformerConfig``."""
    import torch

    return dict(
        normalization="LayerNorm",
        # GPT-2's own GeLU is the tanh form. Named here, because Megatron-core's fused GeLU is
        # that form and its unfused one is not.
        activation_func=partial(torch.nn.functional.gelu, approximate="tanh"),
        gated_linear_unit=False,
        add_bias_linear=shape.linear_bias,
        layernorm_epsilon=1e-5,
    )


POSITION_EMBEDDING = "learned_absolute"
