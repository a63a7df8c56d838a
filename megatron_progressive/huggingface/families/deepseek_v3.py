"""DeepSeek-V3 as ``DeepseekV3ForCausalLM``.

Multi-token prediction modules are the layers behind the model's own layers, with copies of the
embedding and the head, as the published checkpoints keep them; transformers loads these layers only
on demand.
"""

from __future__ import annotations

from typing import Any

from megatron_progressive.huggingface.families.llama3 import (
    HEAD,
    MLP,
    OUTER,
    ROTARY_BUFFERS,
    decoder_sizes,
    decoder_values,
    tied_head,
)
from megatron_progressive.huggingface.family import HuggingFaceFamily, inexpressible
from megatron_progressive.huggingface.rotary import rope_of
from megatron_progressive.huggingface.tensors import (
    Copy,
    Entry,
    GateUp,
    NameMap,
    Rules,
    Zeros,
    entries_of,
)
from megatron_progressive.huggingface.values import Values
from megatron_progressive.models.base import MLA, MOE, MoE, TransformerShape

_EPSILON = 1e-6
"""The epsilon of the norms of latent attention, which the class does not let one set."""
_BIAS_UPDATE_RATE = 0.001
"""The update rate of an imported model, which is the report's for most of its training (arXiv
2412.19437, section 4.2)."""
_MTP_LOSS = 0.1

_LAYER = "model.layers.*"
_ATTENTION: Rules = {
    f"decoder.layers.*.self_attention.{ours}.weight": (
        Entry, (f"{_LAYER}.self_attn.{theirs}.weight",))
    for ours, theirs in {
        "linear_proj": "o_proj",
        "linear_q_proj": "q_proj",
        "linear_q_down_proj": "q_a_proj",
        "q_layernorm": "q_a_layernorm",
        "linear_q_up_proj": "q_b_proj",
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
    }.items()
}  # fmt: skip
_EXPERTS: Rules = {
    "decoder.layers.*.mlp.router.weight": (Entry, (f"{_LAYER}.mlp.gate.weight",)),
    "decoder.layers.*.mlp.router.expert_bias": (
        Entry, (f"{_LAYER}.mlp.gate.e_score_correction_bias",)),
    **{
        f"decoder.layers.*.mlp.{part}.linear_fc1.weight": (
            GateUp, (f"{_LAYER}.mlp.{part}.gate_proj.weight",
                     f"{_LAYER}.mlp.{part}.up_proj.weight"))
        for part in ("experts.*", "shared_experts")
    },
    **{
        f"decoder.layers.*.mlp.{part}.linear_fc2.weight": (
            Entry, (f"{_LAYER}.mlp.{part}.down_proj.weight",))
        for part in ("experts.*", "shared_experts")
    },
}  # fmt: skip
_MTP: Rules = {
    f"mtp.layers.*.{ours}.weight": (Entry, (f"{_LAYER}.{theirs}.weight",))
    for ours, theirs in {
        "enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj",
        "final_layernorm": "shared_head.norm",
    }.items()
}  # fmt: skip


def _shape_of(config: Values) -> TransformerShape:
    heads = config.integer("num_attention_heads")
    config.require("num_key_value_heads", heads)
    config.require("rms_norm_eps", _EPSILON)
    config.require("rope_interleave", True)
    config.require("norm_topk_prob", True)
    config.require("scoring_func", "sigmoid")
    config.require("topk_method", "noaux_tc")
    config.require("moe_layer_freq", 1)
    # widths that follow from others, and training
    config.ignore("head_dim", "qk_head_dim", "ep_size", "aux_loss_alpha", "seq_aux")
    mla = MLA(
        q_lora_rank=config.integer("q_lora_rank", 0, least=0),
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_nope_head_dim=config.integer("qk_nope_head_dim"),
        qk_rope_head_dim=config.integer("qk_rope_head_dim"),
        v_head_dim=config.integer("v_head_dim"),
    )
    top_k, groups = config.integer("num_experts_per_tok", least=2), config.integer("n_group")
    chosen = config.integer("topk_group")
    if groups > 1 and top_k != 2 * chosen and config.findings.sizes_are_known:
        config.refuse("num_experts_per_tok", f"2 of each of topk_group {chosen} groups")
    moe = MoE(
        num_experts=config.integer("n_routed_experts", least=2),
        top_k=top_k,
        ffn_hidden_size=config.integer("moe_intermediate_size"),
        shared_experts=config.integer("n_shared_experts", 0, least=0),
        first_k_dense=config.integer("first_k_dense_replace", 0, least=0),
        num_groups=groups,
        top_k_groups=chosen,
        routed_scaling_factor=config.number("routed_scaling_factor"),
        bias_update_rate=_BIAS_UPDATE_RATE,
    )
    sizes = decoder_sizes(config)
    head_dim = max(1, sizes["hidden_size"] // heads)
    sizes |= dict(num_query_groups=heads, head_dim=head_dim, norm_epsilon=_EPSILON)
    config.value("num_mtp_layers")  # the name of the next key inside transformers
    mtp = config.integer("num_nextn_predict_layers", 0, least=0)
    shape = TransformerShape(
        family="deepseek_v3", **sizes, rope=rope_of(config, "yarn"), mla=mla, moe=moe,
        mtp_layers=mtp, mtp_loss_coeff=_MTP_LOSS,
    )  # fmt: skip
    if config.findings.sizes_are_known and not _modules_are_alike(shape):
        config.refuse("first_k_dense_replace", "one that makes the layers behind the last one of "
                      "its kind")  # fmt: skip
    return shape


def _modules_are_alike(shape: TransformerShape) -> bool:
    """Whether prediction modules have the kind of the last layer, as ours do; the kind of theirs
    follows from their number."""
    assert shape.moe is not None
    if not shape.mtp_depth:
        return True
    last = shape.layer_kinds()[-1] == MOE
    numbers = range(shape.num_layers, shape.num_layers + shape.mtp_depth)
    return all((number >= shape.moe.first_k_dense) == last for number in numbers)


def _config_of(shape: TransformerShape) -> dict[str, Any]:
    mla, moe, rope = shape.mla, shape.moe, shape.rope
    assert mla is not None
    assert moe is not None
    assert rope is not None
    grouped = moe.num_groups > 1 and moe.top_k != 2 * moe.top_k_groups
    for wrong, field, got, accepted in (
        (shape.norm_epsilon != _EPSILON, "norm_epsilon", shape.norm_epsilon, str(_EPSILON)),
        (moe.num_experts < 2, "moe.num_experts", moe.num_experts, "from 2"),
        (moe.top_k < 2, "moe.top_k", moe.top_k, "from 2 (it normalises their weights)"),
        (grouped, "moe.top_k", moe.top_k, f"2 of each of top_k_groups {moe.top_k_groups}"),
        (moe.num_experts < 2 * moe.num_groups, "moe.num_groups", moe.num_groups,
         "groups of 2 experts at least"),
        # Megatron-core scales the attention by it whatever the scaling of positions
        (rope.scaling == "none" and rope.factor != 1, "rope.factor", rope.factor,
         "1 without a scaling"),
        (not _modules_are_alike(shape), "moe.first_k_dense", moe.first_k_dense,
         "one that makes the layers behind the last one of its kind"),
    ):  # fmt: skip
        if wrong:
            raise inexpressible(field, got, accepted, "DeepseekV3ForCausalLM")
    values = decoder_values(shape)
    del values["head_dim"]  # theirs is of the rotated part only
    return {
        **values,
        "attention_bias": False,
        "num_key_value_heads": shape.num_attention_heads,
        "q_lora_rank": mla.q_lora_rank or None,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_interleave": True,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "n_shared_experts": moe.shared_experts,
        "first_k_dense_replace": moe.first_k_dense,
        "moe_layer_freq": 1,
        "n_group": moe.num_groups,
        "topk_group": moe.top_k_groups if moe.num_groups > 1 else 1,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": shape.mtp_depth,
    }


def _name_map(shape: TransformerShape) -> NameMap:
    assert shape.moe is not None
    entries = tuple(entries_of(shape, {**OUTER, **_ATTENTION, **MLP, **_EXPERTS, **_MTP}))
    by_name = {entry.ours: entry for entry in entries}
    embedding = by_name["embedding.word_embeddings.weight"]
    head = by_name.get("output_layer.weight", embedding)
    modules = range(shape.num_layers, shape.num_layers + shape.mtp_depth)
    copies = [
        Copy(name, entry)
        for number in modules
        for name, entry in (
            (f"model.layers.{number}.embed_tokens.weight", embedding),
            (f"model.layers.{number}.shared_head.head.weight", head),
        )
    ]
    kinds = shape.layer_kinds()
    kinds += kinds[-1:] * shape.mtp_depth
    zeros = []
    for number in (number for number, kind in enumerate(kinds) if kind == MOE):
        mlp = f"model.layers.{number}.mlp"
        if not shape.moe.bias_update_rate:
            bias = (shape.moe.num_experts,)
            zeros.append(Zeros(f"{mlp}.gate.e_score_correction_bias", bias))
        if not shape.moe.shared_experts:  # the class has them, of no width
            h = shape.hidden_size
            for name, size in (("gate", (0, h)), ("up", (0, h)), ("down", (h, 0))):
                zeros.append(Zeros(f"{mlp}.shared_experts.{name}_proj.weight", size))
    return NameMap(entries, (*copies, *tied_head(shape, entries, HEAD)), tuple(zeros))


HUGGING_FACE = HuggingFaceFamily(
    family="deepseek_v3",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    config_class="DeepseekV3Config",
    shape_of=_shape_of,
    config_of=_config_of,
    name_map=_name_map,
    ignored=ROTARY_BUFFERS,
)
