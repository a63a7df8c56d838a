"""Tables of global tensors, built from the parts that families share.

Tensors are in the order in which Megatron-core 0.19.2 registers the parameters of its local layer
spec: planning derives from it how optimizers cut them.
"""

from __future__ import annotations

from megatron_progressive.models.base import (
    LAYER_PREFIX,
    MLA,
    MOE,
    MoE,
    TensorSpec,
    TransformerShape,
    spectral_std,
)

EMBEDDING_STD = 0.02
"""Standard deviation of the embeddings' initial values, GPT-2's own (Radford et al. 2019); layers
use the spectral condition."""

MTP_PREFIX = "mtp.layers."

Table = dict[str, TensorSpec]


class TableBuilder:
    """Collects the tensors of one model.

    Args:
        norm_bias: whether norms have a bias (LayerNorm) or not (RMSNorm).
        gated: whether MLPs are gated: their first linear is two matrices, gate and up.
        qk_norm: whether queries and keys are normalised per head (without MLA).
    """

    def __init__(
        self, shape: TransformerShape, *, norm_bias: bool, gated: bool, qk_norm: bool = False
    ) -> None:
        self.shape, self.norm_bias, self.gated, self.qk_norm = shape, norm_bias, gated, qk_norm
        self.table: Table = {}

    def model(self, learned_positions: bool) -> Table:
        """The whole table."""
        shape, table = self.shape, self.table
        vocabulary = (shape.padded_vocab_size, shape.hidden_size)
        table["embedding.word_embeddings.weight"] = TensorSpec(
            vocabulary, "embedding", "normal", EMBEDDING_STD, tp_axis=0, live_rows=shape.vocab_size
        )
        if learned_positions:
            table["embedding.position_embeddings.weight"] = TensorSpec(
                (shape.sequence_length, shape.hidden_size), "position", "normal", EMBEDDING_STD
            )
        kinds = shape.layer_kinds()
        for number, kind in enumerate(kinds):
            self._layer(f"{LAYER_PREFIX}{number}", kind)
        self._norm("decoder.final_layernorm", shape.hidden_size)
        for number in range(shape.mtp_depth):
            self._mtp(f"{MTP_PREFIX}{number}", kinds[-1])
        if not shape.tie_embeddings:
            table["output_layer.weight"] = TensorSpec(
                vocabulary, "head", "normal", EMBEDDING_STD, tp_axis=0, live_rows=shape.vocab_size
            )
        return table

    def _norm(self, name: str, width: int) -> None:
        self.table[f"{name}.weight"] = TensorSpec((width,), "norm_gain", "ones")
        if self.norm_bias:
            self.table[f"{name}.bias"] = TensorSpec((width,), "norm_bias", "zeros")

    def _linear(
        self, name: str, role: str, n_out: int, n_in: int, *, column: bool = True,
        row_blocks: tuple[int, ...] = (), gated: bool = False, expert: int | None = None,
    ) -> None:  # fmt: skip
        """Column-parallel linears are cut along the output, row-parallel along the input.

        Row-parallel linears write to the residual stream, and there are 2 L of them: GPT-2 scales
        their initial values by 1/sqrt(2 L) (Radford et al. 2019, section 2.3). New layers at τ use
        the target's L. A gated first linear has the shape (2, n_out, n_in), gate before up.
        """
        std = spectral_std(n_out, n_in)
        if not column:
            std *= (2 * self.shape.num_layers) ** -0.5
        out_axis = 1 if gated else 0
        self.table[f"{name}.weight"] = TensorSpec(
            (2, n_out, n_in) if gated else (n_out, n_in), role, "normal", std,
            tp_axis=out_axis if column else out_axis + 1, row_blocks=row_blocks,
            last_linear=not column, expert=expert,
        )  # fmt: skip
        if self.shape.linear_bias:
            self.table[f"{name}.bias"] = TensorSpec(
                (2, n_out) if gated else (n_out,), "bias", "zeros",
                tp_axis=out_axis if column else None, last_linear=not column, expert=expert,
            )  # fmt: skip

    def _layer(self, layer: str, kind: str) -> None:
        shape = self.shape
        self._norm(f"{layer}.input_layernorm", shape.hidden_size)
        if shape.mla is not None:
            self._latent_attention(f"{layer}.self_attention", shape.mla)
        else:
            self._attention(f"{layer}.self_attention")
        self._norm(f"{layer}.pre_mlp_layernorm", shape.hidden_size)
        if kind == MOE and shape.moe is not None:
            self._experts(f"{layer}.mlp", shape.moe)
        else:
            self._mlp(f"{layer}.mlp", shape.ffn_hidden_size)

    def _attention(self, name: str) -> None:
        shape, width = self.shape, self.shape.head_dim
        groups = shape.num_query_groups
        query = shape.num_attention_heads // groups * width
        h = shape.hidden_size
        self._linear(f"{name}.linear_proj", "proj", h, query * groups, column=False)
        rows = (query, width, width)
        self._linear(f"{name}.linear_qkv", "qkv", groups * sum(rows), h, row_blocks=rows)
        if self.qk_norm:
            self._norm(f"{name}.q_layernorm", width)
            self._norm(f"{name}.k_layernorm", width)

    def _latent_attention(self, name: str, mla: MLA) -> None:
        h, heads = self.shape.hidden_size, self.shape.num_attention_heads
        self._linear(f"{name}.linear_proj", "proj", h, heads * mla.v_head_dim, column=False)
        queries = heads * mla.qk_head_dim
        if mla.q_lora_rank:
            self._linear(f"{name}.linear_q_down_proj", "q_down", mla.q_lora_rank, h)
            self._linear(f"{name}.linear_q_up_proj", "q_up", queries, mla.q_lora_rank)
        else:
            self._linear(f"{name}.linear_q_proj", "q_proj", queries, h)
        down = mla.kv_lora_rank + mla.qk_rope_head_dim
        self._linear(f"{name}.linear_kv_down_proj", "kv_down", down, h)
        rows = (mla.qk_nope_head_dim, mla.v_head_dim)
        self._linear(
            f"{name}.linear_kv_up_proj", "kv_up", heads * sum(rows), mla.kv_lora_rank,
            row_blocks=rows,
        )  # fmt: skip
        if mla.q_lora_rank:
            self._norm(f"{name}.q_layernorm", mla.q_lora_rank)
        self._norm(f"{name}.kv_layernorm", mla.kv_lora_rank)

    def _mlp(self, name: str, ffn: int, expert: int | None = None) -> None:
        h = self.shape.hidden_size
        self._linear(f"{name}.linear_fc1", "fc1", ffn, h, gated=self.gated, expert=expert)
        self._linear(f"{name}.linear_fc2", "fc2", h, ffn, column=False, expert=expert)

    def _experts(self, name: str, moe: MoE) -> None:
        h = self.shape.hidden_size
        self.table[f"{name}.router.weight"] = TensorSpec(
            (moe.num_experts, h), "router", "normal", spectral_std(moe.num_experts, h)
        )
        if moe.bias_update_rate:
            self.table[f"{name}.router.expert_bias"] = TensorSpec(
                (moe.num_experts,), "expert_bias", "zeros", trainable=False
            )
        for expert in range(moe.num_experts):
            self._mlp(f"{name}.experts.{expert}", moe.ffn_hidden_size, expert)
        if moe.shared_experts:
            self._mlp(f"{name}.shared_experts", moe.shared_experts * moe.ffn_hidden_size)

    def _mtp(self, name: str, kind: str) -> None:
        h = self.shape.hidden_size
        self._norm(f"{name}.enorm", h)
        self._norm(f"{name}.hnorm", h)
        self._linear(f"{name}.eh_proj", "mtp_proj", h, 2 * h)
        self._layer(f"{name}.mtp_model_layer", kind)
        self._norm(f"{name}.final_layernorm", h)
