"""What a folder of Hugging Face holds beside the weights comes back from an import and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_progressive import cli
from megatron_progressive.checkpoints.checkpoint import checkpoint_path
from megatron_progressive.data.tokenizer import train_bpe
from tests.data.small_corpora import make_documents, write_json_lines
from tests.huggingface.test_huggingface import assert_same, quiet, safetensors_of  # noqa: F401
from tests.jobs import Jobs

VOCABULARY = 300
TEMPLATE = (
    "{% for m in messages %}<|s|>{{ m['role'] }}: {{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant: {% endif %}"
)
CHAT = [{"role": "user", "content": "what is 2?"}, {"role": "assistant", "content": "less than 3"}]
GENERATION = {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 2, "do_sample": True,
              "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.45.0"}  # fmt: skip
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
"""``config.json`` of SmolLM2-135M-Instruct as it is published."""
SMALLER = {"hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 3,
           "max_position_embeddings": 64, "vocab_size": VOCABULARY}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def write_tokenizer(folder: Path) -> None:
    """As instruct models have it: the end of a turn beside the end of text, a template for chat,
    another for tools, a start token that the tokenizer puts first."""
    from tokenizers import processors

    backend = train_bpe(make_documents(60), VOCABULARY - 3).backend
    backend.add_special_tokens(["<|s|>", "<|eot|>"])
    backend.add_tokens(["added"])
    start = [("<|s|>", backend.token_to_id("<|s|>"))]
    backend.post_processor = processors.TemplateProcessing(single="<|s|> $A", special_tokens=start)
    backend.enable_truncation(50)
    backend.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<|s|>", "eos_token": "<|endoftext|>"}
    settings = {**tokens, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64,
                "clean_up_tokenization_spaces": False, "chat_template": "old"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    map_of_tokens = {**tokens, "pad_token": {"content": "<|eot|>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(map_of_tokens))
    (folder / "added_tokens.json").write_text(json.dumps({"added": backend.token_to_id("added")}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 made small, with all that an instruct model's folder holds."""
    import transformers

    folder = tmp_path_factory.mktemp("instruct") / "theirs"
    torch.manual_seed(0)
    values = {**SMOLLM2, **SMALLER, "eos_token_id": [0, 2]}
    config = transformers.LlamaConfig(**{k: v for k, v in values.items() if "dtype" not in k})
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    write_tokenizer(folder)
    return folder


BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates/tools.jinja",
)  # fmt: skip


def assert_used_alike(out: Path, folder: Path) -> None:
    """Files byte for byte, and what transformers makes of them."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    for name in BESIDE:
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    assert not (out / "kept_config.json").exists()
    assert read(out / "generation_config.json") == read(folder / "generation_config.json")
    got, expected = (AutoTokenizer.from_pretrained(path) for path in (out, folder))
    assert expected.pad_token == "<|eot|>"
    assert got.special_tokens_map == expected.special_tokens_map
    for asked in (False, True):
        texts = [one.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=asked,
                                         chat_template=one.chat_template["default"])
                 for one in (got, expected)]  # fmt: skip
        assert texts[0] == texts[1]
        assert "user: what is 2?" in texts[0]
    assert got("alpha added")["input_ids"] == expected("alpha added")["input_ids"]
    assert len(got) == len(expected)
    one, other = (GenerationConfig.from_pretrained(path).to_dict() for path in (out, folder))
    assert one == other
    assert one["temperature"] == 0.6
    ids = [AutoConfig.from_pretrained(path).eos_token_id for path in (out, folder)]
    assert ids == [[0, 2], [0, 2]]


def test_all_of_it_comes_back(instruct: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint, grown, out = (tmp_path / name for name in ("checkpoint", "grown", "out"))
    assert cli.main(["import", "hf", str(instruct), str(checkpoint)]) == 0
    expand = ["--to-layers", "6", "--init", "copying_zeroL"]
    assert cli.main(["checkpoint", "expand", str(checkpoint), str(grown), *expand]) == 0
    assert cli.main(["export", "hf", str(grown), str(out)]) == 0
    assert_used_alike(out, instruct)
    expected = {**SMOLLM2, **SMALLER, "eos_token_id": [0, 2], "num_hidden_layers": 6}
    free = {"transformers_version", "num_hidden_layers"}
    got = read(out / "config.json")
    assert {k: got.get(k) for k in expected if k not in free} == {
        k: v for k, v in expected.items() if k not in free
    }
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (out, instruct)]
    assert models[0].generation_config.to_dict() == models[1].generation_config.to_dict()
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        logits = [model(tokens).logits for model in models]
    assert torch.equal(logits[0], logits[1])  # new layers that do nothing


def test_a_run_gives_it_back(jobs: Jobs, instruct: Path, tmp_path: Path) -> None:
    """Through the prepared corpus, from which the run's tokenizer is."""
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    assert cli.main(["import", "hf", str(instruct), str(checkpoint)]) == 0
    corpus = write_json_lines(tmp_path / "corpus.jsonl", make_documents(200))
    values = {
        "run": {"name": "run", "dir": str(tmp_path), "init_from": str(checkpoint)},
        "model": {"family": "llama3"},
        "data": {"corpus": str(corpus), "tokenizer": str(checkpoint / "tokenizer"),
                 "sequence_length": 16},
        "train": {"steps": 3, "global_batch": 4, "micro_batch": 4, "eval_every": 3,
                  "eval_samples": 4, "save_every": 3},
        "optim": {"lr": 0.001},
        "expansion": [{"at": 1, "to_layers": 4, "init": "copying_zeroL"}],
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    job = jobs.run(1, tmp_path, ["train", str(path)])
    assert job.codes == [0], job.output
    last = checkpoint_path(tmp_path / "run", 3)
    assert cli.main(["export", "hf", str(last), str(out)]) == 0
    assert_used_alike(out, instruct)
    config = read(out / "config.json")
    assert (config["eos_token_id"], config["pad_token_id"]) == ([0, 2], 2)


def test_without_a_tokenizer(instruct: Path, tmp_path: Path, capsys: Any) -> None:
    """Tokens that ``config.json`` names, or that its class has where it names none."""
    from transformers import GenerationConfig

    folder = tmp_path / "theirs"
    folder.mkdir()
    shutil.copy(instruct / "model.safetensors", folder)
    for number, (changes, ids) in enumerate([
        ({}, {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 2}),
        ({"pad_token_id": None, "eos_token_id": 7}, {"eos_token_id": 7, "pad_token_id": None}),
    ]):  # fmt: skip
        values = {**SMOLLM2, **SMALLER, "eos_token_id": [0, 2], **changes}
        (folder / "config.json").write_text(json.dumps(values))
        checkpoint, grown, out = (tmp_path / f"{name}{number}" for name in "cgo")
        assert cli.main(["import", "hf", str(folder), str(checkpoint)]) == 0
        expand = ["checkpoint", "expand", str(checkpoint), str(grown), "--to-layers", "4"]
        assert cli.main(expand) == 0
        capsys.readouterr()
        assert cli.main(["export", "hf", str(grown), str(out)]) == 0
        assert "exported without one" in capsys.readouterr().err
        config = read(out / "config.json")
        generation = GenerationConfig.from_pretrained(out).to_dict()
        assert {key: config[key] for key in ids} == ids
        assert {key: generation[key] for key in ids} == ids
    del values["bos_token_id"], values["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(values))
    assert cli.main(["import", "hf", str(folder), str(tmp_path / "none")]) == 0
    assert cli.main(["export", "hf", str(tmp_path / "none"), str(tmp_path / "out")]) == 0
    assert not {"bos_token_id", "eos_token_id"} & read(tmp_path / "out" / "config.json").keys()


def test_a_larger_tokenizer_than_the_model_comes_back(
    instruct: Path, tmp_path: Path, capsys: Any
) -> None:
    from tokenizers import Tokenizer

    folder, checkpoint, out = (tmp_path / name for name in ("theirs", "checkpoint", "out"))
    shutil.copytree(instruct, folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([f"more {n}" for n in range(9)])
    backend.save(str(folder / "tokenizer.json"))
    assert cli.main(["import", "hf", str(folder), str(checkpoint)]) == 0
    capsys.readouterr()
    assert cli.main(["export", "hf", str(checkpoint), str(out)]) == 0
    assert "309 entries, the model 300" in capsys.readouterr().err
    assert_used_alike(out, folder)


def test_another_tokenizer_leaves_its_ids_behind(
    instruct: Path, corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    assert cli.main(["import", "hf", str(instruct), str(checkpoint)]) == 0
    small = tmp_path / "small"
    small.mkdir()
    train_bpe(make_documents(9), 280).backend.save(str(small / "tokenizer.json"))
    (small / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    capsys.readouterr()
    command = ["export", "hf", str(checkpoint), str(out), "--tokenizer", str(small)]
    assert cli.main(command) == 0
    line = "--tokenizer: left behind generation_config.json, kept_config.json of"
    assert line in capsys.readouterr().err
    assert read(out / "config.json")["eos_token_id"] == 0
    assert "temperature" not in read(out / "generation_config.json")


def test_what_is_left_behind_is_named(instruct: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(instruct, folder)
    (folder / "README.md").write_text("a model")
    (folder / "onnx").mkdir()
    (folder / ".gitattributes").write_text("")
    assert cli.main(["import", "hf", str(folder), str(tmp_path / "out")]) == 0
    assert "left behind: README.md, onnx/ (no part of" in capsys.readouterr().err


@pytest.mark.parametrize("dtypes", [("float16",), ("float16", "bfloat16"), ("bfloat16", "float32")])
def test_types_that_fp32_holds(
    instruct: Path, tmp_path: Path, capsys: Any, dtypes: tuple[str, ...]
) -> None:
    folder, checkpoint, out = (tmp_path / name for name in ("theirs", "checkpoint", "out"))
    shutil.copytree(instruct, folder)
    tensors = {
        name: tensor.to(getattr(torch, dtypes[number % len(dtypes)]))
        for number, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items())
    }
    save_file(tensors, folder / "model.safetensors")
    assert cli.main(["import", "hf", str(folder), str(checkpoint)]) == 0
    found = capsys.readouterr()
    names = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    words = " and ".join(sorted(names[dtype] for dtype in dtypes))
    assert f"weights in {words}: kept as float32, exactly" in found.err
    assert "3 layers, float32" in found.out
    assert cli.main(["export", "hf", str(checkpoint), str(out)]) == 0
    assert_same(safetensors_of(out), {name: t.float() for name, t in tensors.items()})
