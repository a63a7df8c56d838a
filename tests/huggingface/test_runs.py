"""Imported models train as transformers trains them, runs start from checkpoints, and what they
become generates text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_progressive import cli
from megatron_progressive import config as configuration
from megatron_progressive.checkpoints.checkpoint import checkpoint_path, read_description
from megatron_progressive.checkpoints.init_from import with_initial_model
from megatron_progressive.checkpoints.streamed import TensorReader
from megatron_progressive.config import ConfigError
from megatron_progressive.huggingface.exporting import export_checkpoint, plan_export
from megatron_progressive.huggingface.importing import import_folder, plan_import
from megatron_progressive.models import model_shape
from megatron_progressive.reshard.boxes import MASTER, PARAM
from tests.checkpoints.altered import alter
from tests.huggingface import random_models
from tests.huggingface.test_huggingface import quiet  # noqa: F401
from tests.jobs import Jobs
from tests.pool import Pool

STEPS = 20
LR = 0.003


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3"])
def test_losses_equal_transformers(pool: Pool, tmp_path: Path, family: str) -> None:
    config = random_models.random_config(family, 7, {})
    pool.run(1, random_models.save_random, config, tmp_path)
    source, out = checkpoint_path(tmp_path, 2), tmp_path / "out"
    words = ["optim.name=adamw", "optim.weight_decay=0.1"]
    ours = pool.run(1, random_models.losses, source, words, STEPS, LR)[0]
    export_checkpoint(plan_export(source, out))
    model = (
        random_models.hugging_face_class(family).from_pretrained(out, dtype=torch.float32).train()
    )
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=LR,
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
        weight_decay=0.1,
    )
    theirs = []
    for number in range(STEPS):
        sample = random_models.batch_of(model.config.vocab_size, 8 * number, 8)
        logits = model(sample[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(float(loss))
    assert theirs[-1] < theirs[0]
    deviation = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    print(f"{family}: {deviation:.1e}")
    assert deviation < 1e-5


@pytest.fixture(scope="module")
def imported(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """transformers' model and the checkpoint that it was imported to, tokenizer and all."""
    import transformers

    folder = tmp_path_factory.mktemp("imported")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=515, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "theirs")
    for file in (corpus / "tokenizer").iterdir():
        shutil.copy(file, folder / "theirs")
    import_folder(plan_import(folder / "theirs", folder / "checkpoint"))
    return model, folder / "checkpoint"


def written(folder: Path, corpus: Path, name: str, init_from: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder), "init_from": str(init_from)},
        "model": {"family": "llama3"},
        "data": {"sequence_length": 32, "prepared": str(corpus)},
        "train": {"steps": 6, "global_batch": 4, "micro_batch": 2, "eval_every": 6,
                  "eval_samples": 8, "save_every": 3, "keep_checkpoints": 0},
        "optim": {"name": "adamw", "lr": 0.001},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def steps_of(run: Path) -> list[tuple[int, float, int]]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(e["step"], e["loss"], e["num_layers"]) for e in events if e["event"] == "train"]


def test_runs_start_from_imported_weights(
    jobs: Jobs, corpus: Path, tmp_path: Path, imported: tuple[Any, Path], capsys: Any
) -> None:
    """One grows offline before it, one in the job; both end as models that generate text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_progressive.data import TrainingData

    model, source = imported
    grown = tmp_path / "grown"
    expand = ["checkpoint", "expand", str(source), str(grown), "--to-layers", "4"]
    assert cli.main([*expand, "--init", "copying_zeroL"]) == 0
    offline = written(tmp_path, corpus, "offline", grown)
    in_job = written(
        tmp_path, corpus, "in_job", source, expansion=[{"at": 4, "to_layers": 4, "init": "copying"}]
    )
    for world, path in ((2, offline), (2, in_job)):
        job = jobs.run(world, tmp_path, ["train", str(path)])
        assert job.codes == [0] * world, job.output
    losses = {name: steps_of(tmp_path / name) for name in ("offline", "in_job")}
    assert [layers for _, _, layers in losses["offline"]] == [4] * 6
    assert [layers for _, _, layers in losses["in_job"]] == [2] * 4 + [4] * 2
    # new layers that do nothing, and none: both begin with transformers' loss
    config = configuration.load(tmp_path / "in_job" / "config.yaml")
    sample = TrainingData.open(config).train_batch(0, 4)
    with torch.no_grad():
        logits = model(sample[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten())
    assert losses["offline"][0][1] == pytest.approx(float(loss), rel=1e-5)
    assert losses["in_job"][0][1] == pytest.approx(float(loss), rel=1e-5)
    # a run that has its own checkpoint does not need the first one any more
    shutil.rmtree(grown)
    unbroken = losses["offline"]
    shutil.rmtree(checkpoint_path(tmp_path / "offline", 6))
    (tmp_path / "offline" / "summary.json").unlink()
    job = jobs.run(2, tmp_path, ["train", str(offline)])
    assert job.codes == [0, 0], job.output
    assert steps_of(tmp_path / "offline") == unbroken
    assert cli.main(["plan", str(offline)]) == 0
    # without it there is nothing to start from
    shutil.rmtree(tmp_path / "offline" / "checkpoints")
    (tmp_path / "offline" / "summary.json").unlink()
    assert cli.main(["train", str(offline)]) == 2
    for name in ("in_job",):
        out = tmp_path / f"{name}_out"
        path = checkpoint_path(tmp_path / name, 6)
        capsys.readouterr()
        assert cli.main(["export", "hf", str(path), str(out)]) == 0
        instead = "eos_token_id: 0, which ends the run's documents, instead of 2"
        assert instead in capsys.readouterr().err
        tokenizer = AutoTokenizer.from_pretrained(out)
        trained = AutoModelForCausalLM.from_pretrained(out)
        assert (trained.config.num_hidden_layers, trained.config.vocab_size) == (4, 515)
        assert trained.generation_config.eos_token_id == tokenizer.eos_token_id
        prompt = tokenizer("def main(", return_tensors="pt")
        ids = trained.generate(**prompt, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(ids[0])
        assert text.startswith("def main(")
        assert ids.shape[1] > prompt["input_ids"].shape[1]


def test_the_tokenizer_goes_along(
    imported: tuple[Any, Path], corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    _, source = imported
    names = {file.name for file in (corpus / "tokenizer").iterdir()}
    read_description(source)  # its files are listed and whole
    kept = {file.name for file in (source / "tokenizer").iterdir()}
    assert kept == names | {"kept_config.json", "generation_config.json"}
    assert cli.main(["export", "hf", str(source), str(tmp_path / "with")]) == 0
    exported = {file.name for file in (tmp_path / "with").iterdir()}
    own = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert exported == names | own
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    (bare / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        read_description(bare)

    def forget(values: dict[str, Any]) -> None:
        values["files"] = {n: s for n, s in values["files"].items() if "/" not in n}

    alter(bare, forget)
    shutil.rmtree(bare / "tokenizer")
    capsys.readouterr()
    assert cli.main(["export", "hf", str(bare), str(tmp_path / "without")]) == 0
    assert "no tokenizer found: exported without one" in capsys.readouterr().err
    given = ["--tokenizer", str(corpus / "tokenizer")]
    assert cli.main(["export", "hf", str(bare), str(tmp_path / "given"), *given]) == 0
    assert names <= {file.name for file in (tmp_path / "given").iterdir()}


# key=value words, what the line must hold; none: accepted
STARTS: list[tuple[list[str], list[str]]] = [
    ([], []),
    (["model.num_layers=2", "model.hidden_size=32", "data.vocab_size=515"], []),
    (["model.mtp_loss_coeff=0.3", "data.sequence_length=64"], []),
    (["model.family=gpt2"], ["model.family: got 'gpt2'", "llama3"]),
    (["model.num_layers=4"], ["model.num_layers: got 4", "accepted: 2"]),
    (["model.num_query_groups=4"], ["model.num_query_groups: got 4", "accepted: 2"]),
    (["model.rope.theta=5"], ["model.rope.theta: got 5", "10000"]),
    (["model.tie_embeddings=false"], ["model.tie_embeddings: got False"]),
    (["data.sequence_length=65"], ["data.sequence_length: got 65", "up to 64"]),
    (["data.vocab_size=512"], ["data.vocab_size: got 512", "515"]),
    (["run.init_from=/no/such"], ["run.init_from", "/no/such"]),
]


@pytest.mark.parametrize(("words", "line"), STARTS)
def test_sizes_come_from_the_checkpoint(
    imported: tuple[Any, Path], tmp_path: Path, words: list[str], line: list[str]
) -> None:
    path = written(tmp_path, tmp_path, "run", imported[1])
    config = configuration.load(path, words)
    if line:
        with pytest.raises(ConfigError) as error:
            with_initial_model(config)
        assert [word for word in line if word not in str(error.value)] == [], str(error.value)
        return
    resolved = with_initial_model(config)
    shape, record = model_shape(resolved), read_description(imported[1])[1].shape
    length = config.data.sequence_length
    assert shape == type(shape)(**{**vars(record), "sequence_length": length,
                                   "mtp_loss_coeff": config.model.mtp_loss_coeff})  # fmt: skip
    assert with_initial_model(resolved) == resolved


@pytest.mark.parametrize("family", random_models.FAMILIES)
def test_every_family_resolves(pool: Pool, tmp_path: Path, family: str) -> None:
    for seed in range(3):
        config = random_models.random_config(family, seed, {})
        pool.run(1, random_models.save_random, config, tmp_path / str(seed))
        resolved = random_models.config_of(checkpoint_path(tmp_path / str(seed), 2))
        assert model_shape(resolved) == model_shape(config)


def test_learned_positions_keep_their_length(pool: Pool, tmp_path: Path) -> None:
    pool.run(1, random_models.save_random, random_models.random_config("gpt2", 0, {}), tmp_path)
    with pytest.raises(ConfigError, match=r"data\.sequence_length: got 8; accepted: 12"):
        random_models.config_of(checkpoint_path(tmp_path, 2), "data.sequence_length=8")


def test_a_vocabulary_that_is_too_small(
    corpus: Path, tmp_path: Path, pool: Pool, capsys: Any
) -> None:
    pool.run(1, random_models.save_random, random_models.random_config("llama3", 0, {}), tmp_path)
    path = written(tmp_path, corpus, "run", checkpoint_path(tmp_path, 2),
                   data={"sequence_length": 8, "prepared": str(corpus)})  # fmt: skip
    assert cli.main(["train", str(path)]) == 2
    assert "data.vocab_size" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_of_another_precision(pool: Pool, tmp_path: Path, precision: str) -> None:
    """fp32 weights come from the master weights, and master weights from fp32 weights."""
    stored = {"fp32": "bf16", "bf16": "fp32"}[precision]
    config = random_models.random_config("llama3", 1, {"tensor": 2}, f"train.precision={stored}")
    pool.run(2, random_models.save_random, config, tmp_path)
    path = checkpoint_path(tmp_path, 2)
    reader = TensorReader(path)
    words = [f"train.precision={precision}", "optim.name=adamw"]
    got = pool.run(2, random_models.loaded_state, path, words)[0]
    exact = MASTER if stored == "bf16" else PARAM
    names = {name for name, _ in got}
    for name in names:
        expected = reader.read((name, exact))
        if precision == "bf16":
            assert torch.equal(got[name, MASTER], expected)
            assert torch.equal(got[name, PARAM], expected.bfloat16())
        else:
            assert torch.equal(got[name, PARAM], expected)
        for (other, slot), value in got.items():
            if other == name and slot not in (PARAM, MASTER):
                assert not value.any(), (name, slot)
