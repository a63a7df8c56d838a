"""Exported and imported models compute what transformers computes, and come back bit for bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_progressive.checkpoints.checkpoint import checkpoint_path, read_description
from megatron_progressive.checkpoints.streamed import TensorReader
from megatron_progressive.huggingface.exporting import export_checkpoint, plan_export
from megatron_progressive.huggingface.importing import import_folder, plan_import
from megatron_progressive.models import model_shape, tensor_table
from megatron_progressive.reshard.boxes import PARAM
from tests.huggingface import random_models
from tests.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-4
SEEDS = range(5)
LAYOUTS: list[tuple[int, dict[str, int]]] = [
    (1, {}),
    (2, {"tensor": 2}),
    (2, {"pipeline": 2}),
    (2, {"expert": 2}),
    (4, {"tensor": 2, "pipeline": 2}),
]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def layout_of(family: str, seed: int) -> tuple[int, dict[str, int]]:
    world, parallel = LAYOUTS[seed]
    if "expert" in parallel and family not in ("mixtral", "deepseek_v3"):
        return 2, {"tensor": 2}
    return world, parallel


def their_logits(folder: Path, family: str, tokens: np.ndarray) -> np.ndarray:
    model = (
        random_models.hugging_face_class(family).from_pretrained(folder, dtype=torch.float32).eval()
    )
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()  # type: ignore[no-any-return]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint."""
    reader = TensorReader(path)
    table = tensor_table(read_description(path)[1].shape)
    return {name: reader.read((name, PARAM)) for name in table}


def safetensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not found.keys() & part.keys()
        found |= part
    return found


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [n for n in expected if got[n].dtype != expected[n].dtype
                 or not torch.equal(got[n], expected[n])]  # fmt: skip
    assert different == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", random_models.FAMILIES)
def test_export(pool: Pool, tmp_path: Path, family: str, seed: int) -> None:
    world, parallel = layout_of(family, seed)
    config = random_models.random_config(family, seed, parallel)
    pool.run(world, random_models.save_random, config, tmp_path)
    source, out, back = checkpoint_path(tmp_path, 2), tmp_path / "out", tmp_path / "back"
    export_checkpoint(plan_export(source, out), shard_bytes=20_000 if seed != 4 else 1 << 30)
    tokens = random_models.tokens_of(model_shape(config).vocab_size, seed)
    theirs = their_logits(out, family, tokens)
    ours = pool.run(1, random_models.logits, source, tokens)[0]
    assert np.abs(theirs).max() > 0.5  # random enough to tell tensors apart
    np.testing.assert_allclose(theirs, ours, atol=TOLERANCE, rtol=0)
    assert len(list(out.glob("*.safetensors"))) > (seed != 4)
    import_folder(plan_import(out, back))
    imported, original = tensors_of(back), tensors_of(source)
    for name in imported.keys() - original.keys():  # a run without the bias; an import has it
        assert name.endswith("expert_bias")
        assert not imported.pop(name).any()
    assert_same(imported, original)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", random_models.FAMILIES)
def test_import(pool: Pool, tmp_path: Path, family: str, seed: int) -> None:
    torch.manual_seed(seed)
    config = random_models.random_hugging_face_config(family, seed)
    model = random_models.hugging_face_class(family)(config)
    for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "bias" in n)):
        tensor.data += 0.2 * torch.randn_like(tensor)
    folder, path, out = tmp_path / "theirs", tmp_path / "checkpoint", tmp_path / "out"
    model.save_pretrained(folder, max_shard_size="20KB")
    import_folder(plan_import(folder, path))
    progress, record = read_description(path)
    assert (progress.step, record.layout, record.precision) == (0, "imported", "fp32")
    tokens = random_models.tokens_of(config.vocab_size, seed)
    ours = pool.run(1, random_models.logits, path, tokens)[0]
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
    export_checkpoint(plan_export(path, out))
    assert_same(safetensors_of(out), safetensors_of(folder))
    assert_equal_functions(out, folder)


def assert_equal_functions(out: Path, folder: Path) -> None:
    """transformers reads the same model from both configurations."""
    from transformers import AutoConfig

    got, expected = (AutoConfig.from_pretrained(f).to_dict() for f in (out, folder))
    free = {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "n_inner", "head_dim",
            "activation_function", "resid_pdrop", "embd_pdrop", "attn_pdrop", "scoring_func",
            "topk_method", "moe_layer_freq", "num_nextn_predict_layers",
            "num_mtp_layers"}  # fmt: skip
    differ = {k: (got.get(k), v) for k, v in expected.items() if got.get(k) != v and k not in free}
    assert differ == {}


def test_prediction_modules(pool: Pool, tmp_path: Path) -> None:
    """They are layers behind the last one, where transformers' own reader finds all of them."""
    from transformers.modeling_layers import MtpModel

    config = random_models.random_config(
        "deepseek_v3", 0, {}, "model.mtp_layers=2", "model.num_layers=3"
    )
    pool.run(1, random_models.save_random, config, tmp_path)
    source, out, back = checkpoint_path(tmp_path, 2), tmp_path / "out", tmp_path / "back"
    export_checkpoint(plan_export(source, out))
    tokens = random_models.tokens_of(model_shape(config).vocab_size, 0)
    theirs = their_logits(out, "deepseek_v3", tokens)
    ours = pool.run(1, random_models.logits, source, tokens)[0]
    np.testing.assert_allclose(theirs, ours, atol=TOLERANCE, rtol=0)
    model = random_models.hugging_face_class("deepseek_v3").from_pretrained(out)
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[34]\..*"]
    modules = MtpModel.from_pretrained(model)  # raises where a tensor is missing
    weights = tensors_of(source)
    for number, module in enumerate(modules.layers):
        for name, tensor in (
            ("eh_proj.weight", module.eh_proj.weight),
            ("enorm.weight", module.enorm.weight),
            ("hnorm.weight", module.hnorm.weight),
        ):
            assert torch.equal(tensor, weights[f"mtp.layers.{number}.{name}"])
    import_folder(plan_import(out, back))
    assert read_description(back)[1].shape.mtp_layers == 2
    imported, original = tensors_of(back), tensors_of(source)
    assert_same({name: imported[name] for name in original}, original)


def test_modules_that_the_files_lack(pool: Pool, tmp_path: Path, capsys: Any) -> None:
    """transformers names one by default and never has its weights."""
    config = random_models.random_hugging_face_config("deepseek_v3", 0)
    config.num_nextn_predict_layers = 1
    random_models.hugging_face_class("deepseek_v3")(config).save_pretrained(tmp_path / "theirs")
    plan = plan_import(tmp_path / "theirs", tmp_path / "out")
    assert (plan.without_modules, plan.shape.mtp_layers) == (1, 0)


@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_no_layers(pool: Pool, tmp_path: Path, family: str) -> None:
    config = random_models.random_config(family, 0, {}, "model.num_layers=0")
    pool.run(1, random_models.save_random, config, tmp_path)
    source, out = checkpoint_path(tmp_path, 2), tmp_path / "out"
    export_checkpoint(plan_export(source, out))
    tokens = random_models.tokens_of(model_shape(config).vocab_size, 0)
    ours = pool.run(1, random_models.logits, source, tokens)[0]
    np.testing.assert_allclose(their_logits(out, family, tokens), ours, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llama3", "deepseek_v3"])
def test_types(pool: Pool, tmp_path: Path, family: str) -> None:
    """The type that the model computes in, or fp32 from the master weights; and imported bf16."""
    config = random_models.random_config(family, 1, {"tensor": 2}, "train.precision=bf16")
    pool.run(2, random_models.save_random, config, tmp_path)
    source, back = checkpoint_path(tmp_path, 2), tmp_path / "back"
    table = tensor_table(model_shape(config))
    reader = TensorReader(source)
    for dtype, slot in ((None, "param"), ("float32", "master"), ("bfloat16", "param")):
        out = tmp_path / f"out_{dtype}"
        export_checkpoint(plan_export(source, out, dtype))
        got = safetensors_of(out)["model.norm.weight"]
        expected = reader.read(("decoder.final_layernorm.weight", slot))
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    import_folder(plan_import(tmp_path / "out_None", back))
    record = read_description(back)[1]
    assert record.precision == "bf16"
    imported = tensors_of(back)
    assert_same({n: imported[n] for n in table}, tensors_of(source))
    again = tmp_path / "again"
    export_checkpoint(plan_export(back, again))
    assert_same(safetensors_of(again), safetensors_of(tmp_path / "out_None"))


MEASURED = """
import re, sys
from pathlib import Path
import torch
from megatron_progressive.checkpoints import streamed
from megatron_progressive.huggingface import exporting, importing
# getrusage's peak would be the parent's, which a new process inherits
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
source, out = map(Path, sys.argv[2:])
if sys.argv[1] == "import":
    plan, run = importing.plan_import(source, out), importing.import_folder
else:
    plan, run = exporting.plan_export(source, out), exporting.export_checkpoint
before = peak()
run(plan)
print(plan.nbytes / 2**20, peak() - before)
"""


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=512, num_hidden_layers=24, num_attention_heads=8,
        intermediate_size=1536,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    for words in (("import", "theirs", "checkpoint"), ("export", "checkpoint", "out")):
        paths = [str(tmp_path / word) for word in words[1:]]
        command = [sys.executable, "-c", MEASURED, words[0], *paths]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        total, growth = (float(word) for word in done.stdout.split())
        print(f"{words[0]}: {total:.0f} MiB, growth {growth:.0f} MiB")
        assert total > 300
        assert growth < 150
    shutil.rmtree(tmp_path)
