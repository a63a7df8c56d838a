"""Weights and files of a folder that an import refuses or takes, and NaN both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_progressive import cli
from megatron_progressive.checkpoints.checkpoint import read_description, seal
from megatron_progressive.checkpoints.streamed import TensorReader, TensorWriter
from megatron_progressive.models import tensor_table
from megatron_progressive.reshard.boxes import PARAM
from tests.huggingface import random_models
from tests.huggingface.test_refusals import changed, refused


def test_tensors(theirs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    tensors = load_file(theirs["llama3"] / "model.safetensors")
    q, k = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")
    command = ["import", "hf", str(tmp_path / "folder"), str(tmp_path / "out")]

    def folder(values: dict[str, torch.Tensor]) -> None:
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        shutil.copytree(theirs["llama3"], tmp_path / "folder")
        save_file(values, tmp_path / "folder" / "model.safetensors")

    several = {n: t for n, t in tensors.items() if n != q}
    several |= {"model.extra.weight": torch.zeros(2), k: torch.zeros(3, 5)}
    folder(several)
    refused(capsys, tmp_path, command, [f"missing {q}", "not of the model model.extra.weight",
                                        f"{k} [3, 5] instead of"])  # fmt: skip
    folder({n: t for n, t in tensors.items() if "norm" not in n and "proj" not in n})
    refused(capsys, tmp_path, command, ["missing model.", "more; accepted"])
    folder({**tensors, q: tensors[q].double()})
    refused(capsys, tmp_path, command, [f"a type other than F32, BF16, F16 {q} F64"])
    folder({**tensors, q: tensors[q].to(torch.float8_e4m3fn)})
    refused(capsys, tmp_path, command, [f"{q} F8_E4M3"])
    path = tmp_path / "folder" / "model.safetensors"
    path.write_bytes((theirs["llama3"] / "model.safetensors").read_bytes()[:-8])
    refused(capsys, tmp_path, command, ["model.safetensors is damaged"])
    path.rename(path.with_name("pytorch_model.bin"))
    refused(capsys, tmp_path, command, ["neither model.safetensors nor"])


def test_a_copy_that_differs(theirs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    folder = changed(theirs["gpt2"], tmp_path / "folder", {"tie_word_embeddings": True})
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    command = ["import", "hf", str(folder), str(tmp_path / "out")]
    assert cli.main(command) == 0
    shutil.rmtree(tmp_path / "out")
    tensors["lm_head.weight"] += 1
    save_file(tensors, folder / "model.safetensors")
    refused(capsys, tmp_path, command, ["lm_head.weight", "differs from transformer.wte.weight"])


def test_files_of_the_model_without_a_head_and_with_buffers(
    theirs: dict[str, Path], tmp_path: Path
) -> None:
    """As the first published files of GPT-2 are."""
    folder = changed(theirs["gpt2"], tmp_path / "folder", {"tie_word_embeddings": True})
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    values = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    values["h.0.attn.bias"] = torch.ones(1, 1, random_models.LENGTH, random_models.LENGTH)
    save_file(values, folder / "model.safetensors")
    assert cli.main(["import", "hf", str(folder), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(
    theirs: dict[str, Path], tmp_path: Path, capsys: Any, value: float
) -> None:
    folder = changed(theirs["gpt2"], tmp_path / "folder", {"tie_word_embeddings": True})
    whole = load_file(folder / "model.safetensors")
    norm, embedding = "transformer.ln_f.weight", "transformer.wte.weight"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = {name: tensor.to(dtype) for name, tensor in whole.items()}
        tensors[norm][:2] = value
        tensors[embedding][3, 1] = value
        tensors["lm_head.weight"] = tensors[embedding].clone()
        save_file(tensors, folder / "model.safetensors")
        words = ["NaN or infinite values in", f"{norm} (2 of", f"{embedding} (1 of"]
        command = ["import", "hf", str(folder), str(tmp_path / "out")]
        refused(capsys, tmp_path, command, words)


def test_a_checkpoint_that_is_not_finite(
    theirs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    """As a run that diverged leaves it."""
    source, damaged = tmp_path / "source", tmp_path / "damaged"
    assert cli.main(["import", "hf", str(theirs["llama3"]), str(source)]) == 0
    reader, (progress, model) = TensorReader(source), read_description(source)
    damaged.mkdir()
    with TensorWriter(damaged, reader) as writer:
        for name in tensor_table(model.shape):
            tensor = reader.read((name, PARAM))
            writer.write((name, PARAM), tensor * torch.nan if "final" in name else tensor)
    seal(damaged, progress, model)
    refused(capsys, tmp_path, ["export", "hf", str(damaged), str(tmp_path / "out")],
            ["checkpoint:", "NaN or infinite values in model.norm.weight (32 of 32)"])  # fmt: skip


def test_files(theirs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    tensors = load_file(theirs["llama3"] / "model.safetensors")
    names = sorted(tensors)
    parts = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    folder = tmp_path / "folder"
    command = ["import", "hf", str(folder), str(tmp_path / "out")]
    shutil.copytree(theirs["llama3"], folder)
    (folder / "model.safetensors").unlink()
    for part, chosen in zip(parts, (names[:2], names[2:5], names[5:]), strict=True):
        save_file({name: tensors[name] for name in chosen}, folder / part)
    index = folder / "model.safetensors.index.json"
    places = {name: parts[0 if n < 2 else 1 if n < 5 else 2] for n, name in enumerate(names)}
    index.write_text(json.dumps({"weight_map": places}))
    assert cli.main(command) == 0
    shutil.rmtree(tmp_path / "out")
    save_file({name: tensors[name] for name in names[1:5]}, folder / parts[1])
    refused(capsys, tmp_path, command, [f"{names[1]} of", f"is in {parts[0]} and in {parts[1]}"])
    for part in parts[:2]:
        (folder / part).unlink()
    refused(capsys, tmp_path, command, [f"lacks the file {parts[0]}, {parts[1]}", "index.json"])
    index.write_text("[]")
    refused(capsys, tmp_path, command, ["index.json, which holds no JSON object"])
    index.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    refused(capsys, tmp_path, command,
            ["neither model.safetensors nor", "only pytorch_model.bin", "safetensors"])  # fmt: skip
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
    )
    refused(capsys, tmp_path, command, ["model.safetensors is a pointer of Git LFS"])
    buffers = {"model.rotary_emb.inv_freq": torch.ones(2),
               "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}  # fmt: skip
    save_file({**tensors, **buffers}, folder / "model.safetensors")
    (folder / "generation_config.json").write_text("{")
    refused(capsys, tmp_path, command, ["generation_config.json, which is not JSON"])
    (folder / "generation_config.json").unlink()
    assert cli.main(command) == 0
