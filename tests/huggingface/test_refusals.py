"""What import and export refuse: one line that names it, exit code 2, nothing created."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive.checkpoints.checkpoint import checkpoint_path, read_description
from tests.checkpoints.altered import alter
from tests.huggingface import random_models
from tests.pool import Pool

ROOT = Path(__file__).resolve().parents[2]

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip

# family, changes of config.json (None removes a key), what the line must hold
CONFIGS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama3", {"model_type": "mistral"}, ["model_type", '"mistral"', "llama, qwen3, mixtral"]),
    ("llama3", {"model_type": None}, ["model_type: got null"]),
    ("llama3", {"architectures": ["LlamaForSequenceClassification"]},
     ["architectures", "LlamaForCausalLM"]),
    ("llama3", {"hidden_act": "gelu"}, ["hidden_act", '"gelu"', '"silu"']),
    ("llama3", {"attention_bias": True}, ["attention_bias: got true", "false"]),
    ("llama3", {"mlp_bias": True}, ["mlp_bias: got true"]),
    ("llama3", {"hidden_size": "wide"}, ["hidden_size", '"wide"', "an integer"]),
    ("llama3", {"hidden_size": None}, ["hidden_size: got null", "an integer"]),
    ("llama3", {"vocab_size": True}, ["vocab_size: got true"]),
    ("llama3", {"sliding_window": 4096}, ["sliding_window: got 4096", "no such key"]),
    ("llama3", {"new_feature": {"on": 1}}, ["new_feature", "no such key"]),
    ("llama3", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config"]),
    ("llama3", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor: got 0.5"]),
    ("llama3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
     ["rope_parameters.rope_type", '"dynamic"', '"default", "llama3"']),
    ("llama3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
     ["rope_scaling.type", '"linear"']),
    ("llama3", {"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}},
     ["rope_parameters.low_freq_factor: got 2.0", "1.0"]),
    ("llama3", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 4096}},
     ["original_max_position_embeddings: got 4096", "8192"]),
    ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
     ["rope_parameters.low_freq_factor: got nothing"]),
    ("llama3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
     ["rope_parameters.full_attention", "no such key"]),
    ("llama3", {"rope_scaling": LLAMA3}, ["rope_scaling", "not both"]),
    ("llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
     ["rope_theta: got 10000.0", "500000.0, as in rope_parameters"]),
    ("llama3", {"rope_interleaved": True}, ["rope_interleaved: got true", "no such key"]),
    ("llama3", {"pruned_heads": {"0": [1]}}, ["pruned_heads"]),
    ("llama3", {"use_alibi": True}, ["use_alibi: got true", "no such key"]),
    ("llama3", {"load_in_4bit": True}, ["load_in_4bit: got true"]),
    ("llama3", {"num_experts_per_token": 2}, ["num_experts_per_token: got 2"]),
    ("gpt2", {"activation_function": "relu"}, ["activation_function", '"relu"']),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
    ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights: got false"]),
    ("gpt2", {"add_cross_attention": True}, ["add_cross_attention"]),
    ("gpt2", {"n_head": 3}, ["n_head: got 3", "divisor"]),
    ("qwen3", {"use_sliding_window": True}, ["use_sliding_window: got true"]),
    ("qwen3", {"layer_types": ["sliding_attention"]}, ["layer_types", "full_attention"]),
    ("qwen3", {"attention_bias": True}, ["attention_bias"]),
    ("mixtral", {"sliding_window": 4096}, ["sliding_window: got 4096", "null"]),
    ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise: got 0.1"]),
    ("mixtral", {"num_experts_per_tok": 1}, ["num_experts_per_tok: got 1", "from 2"]),
    ("deepseek_v3", {"rms_norm_eps": 1e-5}, ["rms_norm_eps: got 1e-05", "1e-06"]),
    ("deepseek_v3", {"norm_topk_prob": False}, ["norm_topk_prob"]),
    ("deepseek_v3", {"scoring_func": "softmax"}, ["scoring_func", '"sigmoid"']),
    ("deepseek_v3", {"topk_method": "greedy"}, ["topk_method", '"noaux_tc"']),
    ("deepseek_v3", {"rope_interleave": False}, ["rope_interleave"]),
    ("deepseek_v3", {"moe_layer_freq": 2}, ["moe_layer_freq: got 2"]),
    ("deepseek_v3", {"num_key_value_heads": 1}, ["num_key_value_heads: got 1"]),
    ("deepseek_v3", {"num_experts_per_tok": 1}, ["num_experts_per_tok: got 1", "from 2"]),
    ("deepseek_v3", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 2},
     ["num_experts_per_tok: got 2", "topk_group 2"]),
    ("deepseek_v3", {"rope_parameters": {**YARN, "beta_fast": 16}}, ["beta_fast: got 16", "32"]),
    ("deepseek_v3", {"rope_parameters": {**YARN, "mscale_all_dim": 0.5}},
     ["mscale_all_dim: got 0.5"]),
    ("deepseek_v3", {"rope_parameters": {k: v for k, v in YARN.items() if k != "mscale"}},
     ["rope_parameters.mscale: got nothing"]),
    ("deepseek_v3", {"rope_parameters": {**YARN, "truncate": False}}, ["truncate"]),
    ("deepseek_v3", {"rope_parameters": LLAMA3}, ["rope_type", '"llama3"', '"yarn"']),
]  # fmt: skip


def refused(capsys: Any, folder: Path, command: list[str], words: list[str]) -> None:
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert cli.main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    assert "accepted" in lines[0]
    assert sorted(folder.rglob("*")) == before


def changed(source: Path, folder: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(source, folder)
    values = {**json.loads((source / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(("family", "changes", "words"), CONFIGS)
def test_configuration(
    theirs: dict[str, Path], tmp_path: Path, capsys: Any, family: str, changes: dict[str, Any],
    words: list[str],
) -> None:  # fmt: skip
    folder = changed(theirs[family], tmp_path / "folder", changes)
    command = ["import", "hf", str(folder), str(tmp_path / "out")]
    refused(capsys, tmp_path, command, ["config.json", *words])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama3", {"hidden_act": "swish", "use_cache": False, "attention_dropout": 0.5}),
        ("llama3", {"some_null": None, "initializer_range": 0.5, "problem_type": None}),
        ("llama3", {"rope_parameters": None, "rope_theta": 100.0, "rope_scaling": None}),
        ("gpt2", {"reorder_and_upcast_attn": True, "n_ctx": 1024, "task_specific_params": {}}),
        ("qwen3", {"sliding_window": 4096, "max_window_layers": 2}),
        ("qwen3", {"chunk_size_feed_forward": 0}),  # the default of the class
        ("deepseek_v3", {"aux_loss_alpha": 0.1, "seq_aux": True, "ep_size": 8}),
    ],
)
def test_what_does_not_change_the_model_is_taken(
    theirs: dict[str, Path], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    folder = changed(theirs[family], tmp_path / "folder", changes)
    assert cli.main(["import", "hf", str(folder), str(tmp_path / "out")]) == 0


# what transformers 4 and 5 and the hub's models have in config.json beside the model
HARMLESS: list[tuple[str, dict[str, Any]]] = [
    ("llama3", {"_name_or_path": "a/b", "_model_name_or_path": "a/b", "model_name_or_path": "a/b",
                "base_model_name_or_path": "a/b", "tokenizer_name_or_path": "a/b"}),
    ("llama3", {"rope_interleaved": False, "is_llama_config": True, "pretraining_tp": 2,
                "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}),
    ("llama3", {"unsloth_fixed": True, "unsloth_version": "2025.3.1", "use_sliding_window": False,
                "_attn_implementation_autoset": True, "_flash_attn_2_enabled": True}),
    ("llama3", {"max_length": 20, "temperature": 0.7, "top_k": 50, "num_beams": 4, "prefix": "x",
                "bad_words_ids": [[1]], "tokenizer_class": "LlamaTokenizer", "torchscript": False,
                "pruned_heads": {}, "tie_encoder_decoder": False, "add_cross_attention": False,
                "is_decoder": True, "use_bfloat16": False, "min_new_tokens": 3}),
    ("llama3", {"quantization_config": None, "auto_map": None, "sliding_window": None}),
    ("llama3", {"auto_map": {"AutoConfig": "configuration_llama.LlamaConfig",
                             "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM",
                             "AutoModelForTokenClassification": "modeling_llama.Other"}}),
    ("llama3", {"eos_token_id": [1, 2], "image_token_id": 5, "max_sequence_length": 2048}),
    ("gpt2", {"n_special": 0, "predict_special_tokens": True, "_num_labels": 1, "output_past": True,
              "finetuning_task": None, "attn_pdrop": 0.3, "summary_type": "cls_index"}),
    ("gpt2", {"xla_device": None, "cross_attention_hidden_size": 64, "forced_decoder_ids": [[1, 2]],
              "return_legacy_cache": True, "generation_kwargs": {}, "diversity_penalty": 0.5,
              "encoder_no_repeat_ngram_size": 2, "penalty_alpha": 0.1, "low_memory": True}),
    ("llama3", {"use_alibi": False, "load_in_8bit": False, "neftune_noise_alpha": 5,
                "residual_dropout": 0.1, "trust_remote_code": True, "bf16": True,
                "use_flash_attention_2": True, "language": "en", "base_model": "a/b"}),
    ("qwen3", {"mlp_bias": False, "attention_dropout": 0.1, "layer_types": None}),
    ("mixtral", {"output_router_logits": True, "hidden_dropout": 0.1, "rms_norm_eps": 1e-6}),
    ("deepseek_v3", {"auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3Model"}}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), HARMLESS)
def test_keys_without_meaning_for_the_weights(
    theirs: dict[str, Path], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    folder = changed(theirs[family], tmp_path / "folder", changes)
    assert cli.main(["import", "hf", str(folder), str(tmp_path / "out")]) == 0


def test_defaults_of_the_class_are_taken_and_others_refused(
    theirs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    """Every key that transformers' class has at its default, where the model's sizes do not say
    otherwise."""
    import transformers

    defaults = transformers.MixtralConfig().to_dict()
    own = json.loads((theirs["mixtral"] / "config.json").read_text())
    more = {key: value for key, value in defaults.items() if key not in own}
    assert "chunk_size_feed_forward" in more
    folder = changed(theirs["mixtral"], tmp_path / "folder", more)
    assert cli.main(["import", "hf", str(folder), str(tmp_path / "out")]) == 0


def test_all_keys_are_named_at_once(theirs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    wrong = {"attention_bias": True, "hidden_act": "gelu", "rope_interleaved": True, "new": 1,
             "rope_parameters": {"rope_type": "linear", "factor": 2.0}, "other": [1],
             "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}  # fmt: skip
    names = ["attention_bias", "hidden_act", "rope_interleaved", "new", "other", "auto_map",
             "rope_parameters.rope_type"]  # fmt: skip
    folder = changed(theirs["llama3"], tmp_path / "folder", wrong)
    command = ["import", "hf", str(folder), str(tmp_path / "out")]
    every = [word for name in names for word in (f"{name}: got", f"--allow {name}")]
    refused(capsys, tmp_path, command, every)
    allow = [word for name in names[:-1] for word in ("--allow", name)]
    refused(capsys, tmp_path, [*command, *allow], ["config.json rope_parameters.rope_type: got"])
    capsys.readouterr()
    assert cli.main([*command, *allow, "--allow", "rope_parameters", "--allow", "absent"]) == 0
    lines = capsys.readouterr().err.splitlines()
    for name in names:
        assert [line for line in lines if line.startswith(f"config.json {name}: got")], name
    assert "--allow absent: not needed" in lines
    origin = read_description(tmp_path / "out")[1].imported
    assert origin is not None
    assert origin["from"] == "folder"
    assert origin["allowed"].keys() == set(names)
    assert origin["allowed"]["new"] == "got 1; accepted: no such key"
    assert not [line for line in lines if "--allow rope" in line]
    # sizes cannot be passed over
    (tmp_path / "out").rename(tmp_path / "first")
    sizes = {"hidden_size": "wide", "num_attention_heads": None, "vocab_size": 1.5, "new": 1}
    folder = changed(theirs["llama3"], tmp_path / "sizes", sizes)
    command = ["import", "hf", str(folder), str(tmp_path / "out"), "--allow", "hidden_size"]
    words = ["hidden_size: got", "num_attention_heads: got null", "vocab_size: got 1.5", "new: got"]
    refused(capsys, tmp_path, command, words)


def test_allowed_keys_are_not_given_back(theirs: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(theirs["llama3"], tmp_path / "folder", {"new": 1, "initializer_range": 0.3})
    command = ["import", "hf", str(folder), str(tmp_path / "out"), "--allow", "new"]
    assert cli.main(command) == 0
    assert cli.main(["export", "hf", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "new" not in values
    assert values["initializer_range"] == 0.3


def test_places(theirs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    folder = str(theirs["gpt2"])
    (tmp_path / "there").mkdir()
    refused(capsys, tmp_path, ["import", "hf", str(tmp_path / "no"), str(tmp_path / "out")],
            ["no folder"])  # fmt: skip
    refused(capsys, tmp_path, ["import", "hf", folder, str(tmp_path / "there")], ["is there"])
    refused(
        capsys, tmp_path, ["import", "hf", folder, str(tmp_path / "no/out")], ["out: no folder"]
    )
    refused(capsys, tmp_path, ["import", "hf", str(tmp_path / "there"), str(tmp_path / "out")],
            ["no file", "config.json"])  # fmt: skip
    (tmp_path / "there" / "config.json").write_text("{")
    refused(capsys, tmp_path, ["import", "hf", str(tmp_path / "there"), str(tmp_path / "out")],
            ["is not JSON"])  # fmt: skip


# family, key=value words, what the line must hold
EXPORTS: list[tuple[str, list[str], list[str]]] = [
    ("gpt2", ["model.linear_bias=false"], ["model.linear_bias: got false", "GPT2LMHeadModel"]),
    ("gpt2", ["model.num_query_groups=1"], ["model.num_query_groups: got 1"]),
    ("gpt2", ["model.head_dim=6"], ["model.head_dim: got 6"]),
    ("llama3", ["model.hidden_size=30", "model.head_dim=8", "model.num_attention_heads=4",
                "model.num_query_groups=2"], ["num_attention_heads: got 4", "30"]),
    ("mixtral", ["model.moe.shared_experts=1"], ["moe.shared_experts: got 1"]),
    ("mixtral", ["model.moe.routed_scaling_factor=2.0"], ["moe.routed_scaling_factor: got 2.0"]),
    ("mixtral", ["model.moe.first_k_dense=1"], ["moe.first_k_dense: got 1"]),
    ("deepseek_v3", ["model.norm_epsilon=1e-5"], ["model.norm_epsilon: got 1e-05", "1e-06"]),
    ("deepseek_v3", ["model.moe.num_groups=2", "model.moe.top_k_groups=2", "model.moe.top_k=2"],
     ["moe.top_k: got 2", "top_k_groups 2"]),
    ("deepseek_v3", ["model.num_layers=1", "model.mtp_layers=1", "model.moe.first_k_dense=1"],
     ["moe.first_k_dense: got 1"]),
    ("deepseek_v3", ["model.rope.scaling=none", "model.rope.factor=4"], ["rope.factor: got 4"]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "words", "line"), EXPORTS)
def test_models_that_their_class_cannot_be(
    tmp_path: Path, family: str, words: list[str], line: list[str]
) -> None:
    from megatron_progressive.config import ConfigError
    from megatron_progressive.huggingface import config_from_shape
    from megatron_progressive.models import model_shape
    from tests.engines.on_ranks import family_config

    shape = model_shape(family_config(family, words))
    with pytest.raises(ConfigError) as error:
        config_from_shape(shape)
    assert [word for word in line if word not in str(error.value)] == [], str(error.value)
    assert "\n" not in str(error.value)


def test_export_arguments(pool: Pool, tmp_path: Path, capsys: Any) -> None:
    config = random_models.random_config("gpt2", 0, {})
    pool.run(1, random_models.save_random, config, tmp_path)
    source, out = str(checkpoint_path(tmp_path, 2)), str(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused(capsys, tmp_path, ["export", "hf", source, out, "--dtype", "float16"],
            ["--dtype: got 'float16'", "float32, bfloat16"])  # fmt: skip
    refused(capsys, tmp_path, ["export", "hf", str(tmp_path), out], ["progress.json"])
    refused(capsys, tmp_path, ["export", "hf", source, str(tmp_path / "empty")], ["is there"])
    refused(capsys, tmp_path, ["export", "hf", source, out, "--tokenizer", str(tmp_path / "empty")],
            ["--tokenizer", "has no tokenizer"])  # fmt: skip
    (tmp_path / "empty" / "vocab.json").write_text(json.dumps({"a": 100000}))
    refused(capsys, tmp_path, ["export", "hf", source, out, "--tokenizer", str(tmp_path / "empty")],
            ["100001 entries", "vocab_size"])  # fmt: skip
    shutil.copytree(source, tmp_path / "other")

    def longer(values: dict[str, Any]) -> None:
        values["model"]["sequence_length"] *= 2

    alter(tmp_path / "other", longer)
    refused(capsys, tmp_path, ["export", "hf", str(tmp_path / "other"), out],
            ["missing embedding.position_embeddings.weight"])  # fmt: skip


def test_bad_input_does_not_load_torch(theirs: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(theirs["llama3"], tmp_path / "folder", {"attention_bias": True})
    code = (
        "import sys; from megatron_progressive import cli;"
        f"code = cli.main(['import', 'hf', {str(folder)!r}, {str(tmp_path / 'out')!r}]);"
        "assert code == 2 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
