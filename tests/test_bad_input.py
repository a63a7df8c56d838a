"""Every bad input: one line that names field, value and what is accepted; exit code 2; nothing
created, nothing overwritten."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive.checkpoints.init_from import with_initial_model
from megatron_progressive.config import from_dict, to_yaml
from tests.pool import Pool
from tests.train.small_runs import run_config, run_values, train_here

Case = tuple[str, list[str], int, list[str]]

# name, key=value words, ranks, what the line must hold
TABLE: list[Case] = [
    ("unknown key", ["optim.lrr=0.1"], 1, ["optim.lrr: unknown key", "did you mean optim.lr?"]),
    ("unknown key in a list", ["expansion.0.ini=zero"], 1,
     ["expansion[0].ini: unknown key", "did you mean expansion.init?"]),
    ("not a word", ["optim.lr"], 1, ["optim.lr", "key=value"]),
    ("wrong type", ["train.steps=many"], 1, ["train.steps", "'many'", "an integer"]),
    ("no steps", ["train.steps=0"], 1, ["train.steps", "got 0", "from 1"]),
    ("unknown choice", ["optim.name=sgd"], 1, ["optim.name", "'sgd'", "muon_nsgd, adamw"]),
    ("unknown coefficients", ["optim.ns_coefficients=cubic"], 1,
     ["optim.ns_coefficients", "'cubic'", "jordan, polar_express, deepseek_v4"]),
    ("unknown compute type", ["optim.ns_dtype=fp8"], 1, ["optim.ns_dtype", "'fp8'", "fp32, bf16"]),
    ("no Newton-Schulz steps", ["optim.ns_steps=0"], 1, ["optim.ns_steps: got 0", "from 1"]),
    ("muP is no number", ["model.mup=2"], 1, ["model.mup: got 2", "true or false"]),
    ("muP with another scale", ["model.mup=true", "optim.scale=moonlight"], 1,
     ["optim.scale: got 'moonlight' with model.mup", "out_in"]),
    ("a kernel without CUDA", ["kernels.dropout=true"], 1,
     ["kernels.dropout: got true without a CUDA device", "false, or nothing"]),
    ("unknown family", ["model.family=bert"], 1, ["model.family", "'bert'", "gpt2"]),
    ("unknown preset", ["model.preset=9b"], 1, ["model.preset", "'9b'", "tiny, 124m, 7b"]),
    ("a block beyond the layers", ["expansion.0.init=copying", "expansion.0.block=[0,2]"], 1,
     ["expansion[0].block: got [0, 2]", "last <= 1, the layer before it"]),
    ("a block that is no list", ["expansion.0.block=1"], 1,
     ["expansion[0].block: got 1", "a list, or null"]),
    ("a block of halves", ["expansion.0.init=copying", "expansion.0.block=[0,0.5]"], 1,
     ["expansion[0].block[1]: got 0.5", "an integer"]),
    ("a block of random layers", ["expansion.0.init=random", "expansion.0.block=[0,1]"], 1,
     ["expansion[0].block: got [0, 1] with init random", "copying, copying_zeroL"]),
    ("a climb without an end", ["schedule.rewarm=0.5"], 1,
     ["schedule.rewarm: got 0.5, which is 30 steps", "up to the 20 from the expansion"]),
    ("a climb from above", ["schedule.rewarm=0.1", "schedule.rewarm_from=1.5"], 1,
     ["schedule.rewarm_from: got 1.5", "from 0 to 1"]),
    ("unknown layers climb", ["schedule.rewarm=0.1", "schedule.rewarm_layers=old"], 1,
     ["schedule.rewarm_layers: got 'old'", "all, new, or null"]),
    ("what climbs is left open", ["schedule.rewarm_layers=new"], 1,
     ["schedule.rewarm_layers: got new without schedule.rewarm"]),
    ("a sequence that one rank has", ["parallel.sequence=true"], 1,
     ["parallel.sequence: got true without tensor parallelism", "false, or nothing"]),
    ("a sequence that does not divide", ["parallel.tensor=2", "data.sequence_length=31",
                                         "parallel.sequence=true"], 2,
     ["parallel.sequence: got true with tensor 2", "sequence_length 31"]),
    ("no context", ["parallel.context=0"], 1, ["parallel.context: got 0", "from 1"]),
    ("context over ranks", ["parallel.context=2"], 3,
     ["tensor 1 x pipeline 1 x context 2 = 2", "3 ranks"]),
    ("chunks of a sequence", ["expansion.0.parallel.context=2", "data.sequence_length=30"], 2,
     ["expansion[0].parallel.context: got 2 for sequence_length 30", "a divisor of 15"]),
    ("context and documents", ["parallel.context=2", "data.attention=document"], 2,
     ["parallel.context: got 2 with data.attention 'document'", "data.attention: null"]),
    ("context on deepspeed", ["parallel.engine=deepspeed", "parallel.context=2"], 2,
     ["parallel.context: got 2 with engine deepspeed", "accepted: 1"]),
    ("parts that tensor does not divide", ["parallel.context=2", "parallel.tensor=4",
     "parallel.sequence=true", "data.sequence_length=36"], 8,
     ["parallel.sequence: got true with tensor 4 and context 2", "sequence_length 36"]),
    ("unknown recomputation", ["parallel.recompute=some"], 1,
     ["parallel.recompute: got 'some'", "none, selective, full"]),
    ("unknown part", ["parallel.recompute=selective", "parallel.recompute_modules=[attention]"], 1,
     ["parallel.recompute_modules[0]: got 'attention'", "core_attn"]),
    ("parts that the layers lack",
     ["parallel.recompute=selective", "parallel.recompute_modules=[mlp, mla_up_proj]"], 1,
     ["parallel.recompute_modules: got mla_up_proj", "core_attn, layernorm, mlp"]),
    ("no parts", ["parallel.recompute=selective", "parallel.recompute_modules=[]"], 1,
     ["parallel.recompute_modules: got none", "core_attn, layernorm, mlp"]),
    ("parts of nothing", ["parallel.recompute_modules=[mlp]"], 1,
     ["parallel.recompute_modules: got mlp without recompute: selective", "with it, or nothing"]),
    ("layers of nothing", ["expansion.0.parallel.recompute_layers=1"], 1,
     ["expansion[0].parallel.recompute_layers: got 1 without recompute: full"]),
    ("no layers", ["parallel.recompute=full", "parallel.recompute_layers=0"], 1,
     ["parallel.recompute_layers: got 0", "from 1"]),
    ("a mixture of nothing", ["data.mix=[]"], 1, ["data.mix: got []", "one part or more"]),
    ("a mixture and a corpus", ["data.corpus=stdlib", "data.mix=[{corpus: stdlib, weight: 1}]"], 1,
     ["data.corpus: got 'stdlib' beside data.mix", "one of the two"]),
    ("a weight of nothing", ["data.prepared=null", "data.mix=[{corpus: stdlib, weight: 0}]"], 1,
     ["data.mix[0].weight: got 0", "from 1e-09"]),
    ("unknown key of a part", ["data.prepared=null", "data.mix=[{corpus: a, wheight: 1}]"], 1,
     ["data.mix[0].wheight: unknown key", "did you mean data.mix.weight?"]),
    ("a part that is not there", ["data.prepared=null", "data.mix=[{corpus: ./gone, weight: 1}]"],
     1, ["data.mix[0].corpus: got './gone', which does not exist"]),
    ("a validation set is trained on", ["data.prepared=null", "data.validation.v=stdlib"], 1,
     ["data.validation.v: got stdlib, which the run is trained on", "split: validation"]),
    ("validation sets without names", ["data.validation=[stdlib]"], 1,
     ["data.validation: got ['stdlib']", "names, each with a path or a section"]),
    ("a validation in tokens and samples", ["train.eval_tokens=100"], 1,
     ["train.eval_samples: got 16 beside train.eval_tokens", "null"]),
    ("τ after the run", ["expansion.0.at=61"], 1, ["expansion[0].at", "61", "from 1 to 59"]),
    ("τ at the last step", ["expansion.0.at=60"], 1, ["expansion[0].at", "60", "from 1 to 59"]),
    ("τ below zero", ["expansion.0.at=-0.5"], 1, ["expansion[0].at", "-0.5"]),
    ("stop after the run", ["train.stop_after=61"], 1,
     ["train.stop_after: got 61", "from 41", "train.steps 60"]),
    ("stop at τ", ["train.stop_after=40"], 1, ["train.stop_after: got 40", "from 41"]),
    ("tensor x pipeline over ranks", ["parallel.tensor=2"], 1,
     ["tensor 2 x pipeline 1 = 2", "1 rank"]),
    ("layout after τ over ranks", ["expansion.0.parallel.pipeline=3"], 2,
     ["expansion[0].parallel", "pipeline 3", "2 ranks"]),
    ("heads over tensor", ["parallel.tensor=8", "train.micro_batch=1"], 8,
     ["parallel.tensor: got 8", "num_attention_heads 4"]),
    ("layers over pipeline", ["train.global_batch=12", "expansion.0.parallel.pipeline=3"], 3,
     ["expansion[0].parallel.pipeline: got 3", "4 layers"]),
    ("layers over virtual stages", ["expansion.0.to_layers=6", "expansion.0.parallel.pipeline=2",
                                    "expansion.0.parallel.virtual_pipeline=2"], 2,
     ["expansion[0].parallel.virtual_pipeline: got 2 x pipeline 2 = 4 stages", "6 layers",
      "parallel.uneven: true"]),
    ("uneven stages not asked for", ["model.num_layers=3", "parallel.pipeline=2"], 2,
     ["parallel.pipeline: got 2", "3 layers", "parallel.uneven: true"]),
    ("virtual pipeline without a pipeline", ["parallel.virtual_pipeline=2"], 2,
     ["parallel.virtual_pipeline: got 2 with pipeline 1", "1, or pipeline above 1"]),
    ("pipeline given up, virtual pipeline kept",
     ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "expansion.0.parallel.pipeline=1"], 2,
     ["expansion[0].parallel.virtual_pipeline: got 2 with pipeline 1"]),
    ("no virtual stages", ["parallel.virtual_pipeline=0"], 1,
     ["parallel.virtual_pipeline: got 0", "from 1"]),
    ("uneven is no number", ["parallel.uneven=2"], 1, ["parallel.uneven: got 2", "true or false"]),
    ("micro-batches over stages of a virtual pipeline",
     ["train.global_batch=12", "parallel.pipeline=2", "parallel.virtual_pipeline=2"], 2,
     ["train.global_batch: got 12", "multiple of 8", "2 stages", "VPP=2"]),
    ("virtual pipeline on deepspeed", ["parallel.engine=deepspeed", "parallel.virtual_pipeline=2"],
     1, ["parallel.virtual_pipeline: got 2", "deepspeed"]),
    ("batch over ranks", ["train.micro_batch=3"], 1, ["train.global_batch: got 8", "3"]),
    ("heads over width", ["model.num_attention_heads=5"], 1, ["num_attention_heads: got 5", "64"]),
    ("shallower target", ["expansion.0.to_layers=1"], 1,
     ["expansion[0].to_layers: got 1", "1 layer"]),
    ("copying from nothing", ["model.num_layers=0"], 1,
     ["expansion[0].init: got 'copying'", "random"]),
    ("no tasks to evaluate", ["train.eval_tasks_every=20"], 1,
     ["train.eval_tasks_every: got 20 without train.eval_tasks", "with tasks"]),
    ("tasks between two saves", ["train.eval_tasks=[a]", "train.eval_tasks_every=30"], 1,
     ["train.eval_tasks_every: got 30 with train.save_every 20", "a multiple of it"]),
    ("corpus missing", ["data.prepared=null", "data.corpus=/no/such/corpus"], 1,
     ["data.corpus", "/no/such/corpus"]),
    ("prepared folder missing", ["data.prepared=/no/such/folder"], 1,
     ["data.prepared", "/no/such/folder"]),
    ("sequence longer than the validation text", ["data.sequence_length=90000"], 1,
     ["data.sequence_length", "90000"]),
    ("tokenizer larger than the vocabulary", ["data.vocab_size=300"], 1,
     ["data.vocab_size: got 300", "512"]),
    ("tokenizer missing", ["data.prepared=null", "data.tokenizer=/no/tokenizer"], 1,
     ["data.tokenizer", "/no/tokenizer"]),
]  # fmt: skip


def mprog(
    values: dict[str, Any], folder: Path, words: list[str], ranks: int, capfd: Any
) -> tuple[int, list[str]]:
    """Exit code and standard error's lines of ``mprog train``, in this process."""
    file = folder / "in.yaml"
    file.write_text(yaml.safe_dump(values))
    code = cli.main(["train", str(file), "--nproc", str(ranks), *words])
    return code, capfd.readouterr().err.strip().splitlines()


def assert_refused(code: int, lines: list[str], needed: list[str]) -> None:
    assert code == 2, lines
    assert len(lines) == 1, lines
    for text in needed:
        assert text in lines[0], lines[0]


@pytest.mark.parametrize("case", TABLE, ids=[case[0] for case in TABLE])
def test_refused_in_one_line(case: Case, corpus: Path, tmp_path: Path, capfd: Any) -> None:
    _, words, ranks, needed = case
    runs = tmp_path / "runs"
    code, lines = mprog(run_values(runs, corpus, "run"), tmp_path, words, ranks, capfd)
    assert_refused(code, lines, needed)
    assert not runs.exists()


def test_empty_and_short_corpora(tmp_path: Path, capfd: Any) -> None:
    texts = {"empty.txt": "", "short.txt": "too short"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        values = run_values(tmp_path / "runs", tmp_path, "run")
        values["data"] = {"corpus": str(tmp_path / name), "vocab_size": 512}
        code, lines = mprog(values, tmp_path, [], 1, capfd)
        assert_refused(code, lines, ["data."])
        assert not (tmp_path / "runs").exists()


def test_missing_config_file_and_family(tmp_path: Path, capfd: Any) -> None:
    assert cli.main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capfd.readouterr().err
    code, lines = mprog({"model": {"num_layers": 0}}, tmp_path, [], 1, capfd)
    assert_refused(code, lines, ["model.family: missing"])


def test_tau_in_the_decay_is_a_warning_that_names_the_failure(
    corpus: Path, tmp_path: Path, capfd: Any
) -> None:
    words = ["expansion.0.at=57", "train.steps=60", "train.save_every=0"]
    code, lines = mprog(run_values(tmp_path, corpus, "late"), tmp_path, words, 1, capfd)
    assert code == 0
    assert any(line.startswith("warning:") and "decay" in line for line in lines)
    first = json.loads((tmp_path / "late" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["event"] == "warning"
    assert "loss spike > 2x" in first["message"]


@pytest.fixture(scope="module")
def finished(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    pool.run(1, train_here, run_config(folder, corpus, "run", "train.steps=45"))
    return folder / "run"


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in folder.rglob("*")
    }


def test_run_folder_of_another_configuration(
    finished: Path, corpus: Path, tmp_path: Path, capfd: Any
) -> None:
    before = contents(finished)
    values = run_values(finished.parent, corpus, "run")
    words = ["train.steps=45", "optim.lr=0.02"]
    code, lines = mprog(values, tmp_path, words, 1, capfd)
    assert_refused(code, lines, ["run.name", "optim.lr=0.01", "0.02"])
    assert contents(finished) == before


def test_folder_that_is_no_run_folder(corpus: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    code, lines = mprog(run_values(tmp_path, corpus, "run"), tmp_path, [], 1, capfd)
    assert_refused(code, lines, ["run.name", "no run folder"])
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def _truncate(checkpoint: Path) -> str:
    victim = next(checkpoint.glob("*.distcp"))
    os.truncate(victim, victim.stat().st_size // 2)
    return "truncated"


def _lose(checkpoint: Path) -> str:
    next(checkpoint.glob("*.distcp")).unlink()
    return "missing"


def _no_progress(checkpoint: Path) -> str:
    (checkpoint / "progress.json").write_text("{")
    return "progress.json"


def _no_model(checkpoint: Path) -> str:
    """As a version that did not describe its model has saved it."""
    path = checkpoint / "progress.json"
    values = json.loads(path.read_text())
    for key in ("model", "sha256", "checksum"):
        del values[key]
    path.write_text(json.dumps(values))
    return "progress.json"


@pytest.mark.parametrize("damage", [_truncate, _lose, _no_progress, _no_model])
def test_damaged_checkpoints(
    finished: Path, corpus: Path, tmp_path: Path, capfd: Any, damage: Callable[[Path], str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    words = ["train.steps=45"]
    # the folder moved: only run.dir differs, which is free
    damaged = {damage(checkpoint) for checkpoint in tmp_path.glob("run/checkpoints/*")}
    needed = ["checkpoint:", "step_0000045 is damaged", "no whole one is before it", *damaged]
    before = contents(tmp_path / "run")
    code, lines = mprog(run_values(tmp_path, corpus, "run"), tmp_path, words, 1, capfd)
    assert_refused(code, lines, needed)
    assert contents(tmp_path / "run") == before


# name, what is asked for beside the checkpoint, what the line must hold
EXPAND_TABLE: list[tuple[str, dict[str, str], list[str]]] = [
    ("no such checkpoint", {"checkpoint": "nothing"}, ["no folder", "nothing"]),
    ("a folder of runs", {"checkpoint": "."}, ["is a folder of runs"]),
    ("same depth", {"to-layers": "4"}, ["to_layers: got 4", "more than the 4 layers"]),
    ("no layers", {"to-layers": "0"}, ["to_layers: got 0", "from 1"]),
    ("no number", {"to-layers": "many"}, ["to_layers: got 'many'", "an integer"]),
    ("unknown init", {"init": "copy"}, ["init: got 'copy'", "copying_zeroL"]),
    ("unknown order", {"order": "up"}, ["order: got 'up'", "stack, inter, last"]),
    ("unknown side", {"insert": "left"}, ["insert: got 'left'", "bottom, top, middle"]),
    (
        "half a block",
        {"init": "copying", "block": "1"},
        ["expansion.block: got [1]", "[first, last] with 0 <= first < last <= 4"],
    ),
    (
        "a block of words",
        {"init": "copying", "block": "1,b"},
        ["expansion.block[1]: got 'b'", "an integer"],
    ),
    (
        "a block of random layers",
        {"init": "random", "block": "1,3"},
        ["expansion.block: got [1, 3] with init random", "copying"],
    ),
    ("unknown state policy", {"optimizer-state": "keep"}, ["optimizer_state: got 'keep'", "reset"]),
    ("result is there", {"out": "run"}, ["out: ", "run is there"]),
    ("no folder for the result", {"out": "no/such/folder"}, ["out: no folder", "no/such"]),
]


def expand_offline(folder: Path, checkpoint: str, changes: dict[str, str]) -> int:
    options = {"to-layers": "6", **changes}
    source = folder / options.pop("checkpoint", checkpoint)
    words = [str(source), str(folder / options.pop("out", "out"))]
    words += [word for key, value in options.items() for word in (f"--{key}", value)]
    return cli.main(["checkpoint", "expand", *words])


@pytest.mark.parametrize("case", EXPAND_TABLE, ids=[case[0] for case in EXPAND_TABLE])
def test_offline_expansion_refused(
    finished: Path, case: tuple[str, dict[str, str], list[str]], capfd: Any
) -> None:
    _, changes, needed = case
    before = contents(finished.parent)
    code = expand_offline(finished.parent, "run/checkpoints/step_0000045", changes)
    assert_refused(code, capfd.readouterr().err.strip().splitlines(), needed)
    assert contents(finished.parent) == before


def test_a_run_folder_is_its_newest_checkpoint(
    finished: Path, corpus: Path, tmp_path: Path, capfd: Any
) -> None:
    """For every command that reads a checkpoint, which standard error says; a run that started so
    goes on from its own, whatever the other has saved by then."""
    newest = finished / "checkpoints" / "step_0000045"
    said = f"{finished} is a run folder; its newest checkpoint is {newest}"
    expanded, exported = str(tmp_path / "expanded"), str(tmp_path / "exported")
    for words in (
        ["checkpoint", "inspect", str(finished)],
        ["checkpoint", "expand", str(finished), expanded, "--to-layers", "6"],
        ["export", "hf", str(finished), exported],
    ):
        assert cli.main(words) == 0
        assert capfd.readouterr().err.splitlines()[0] == said
    model = {"family": "gpt2", "preset": "tiny"}
    values = run_values(tmp_path, corpus, "next", model=model, expansion=[])
    given = from_dict(values, [f"run.init_from={finished}"])
    started = with_initial_model(given)
    assert (started.run.init_from, started.model.num_layers) == (str(newest), 4)
    (tmp_path / "next" / "checkpoints" / "step_0000020").mkdir(parents=True)
    (tmp_path / "next" / "config.yaml").write_text(to_yaml(started))
    shutil.copytree(newest, finished / "checkpoints" / "step_0000050")
    try:
        assert with_initial_model(given) == started
    finally:
        shutil.rmtree(finished / "checkpoints" / "step_0000050")


def test_offline_copying_from_nothing(finished: Path, tmp_path: Path, capfd: Any) -> None:
    shutil.copytree(finished / "checkpoints" / "step_0000045", tmp_path / "source")
    path = tmp_path / "source" / "progress.json"
    values = json.loads(path.read_text())
    values["num_layers"] = values["model"]["num_layers"] = 0
    values["model"]["depth_history"] = [[0, 0]]
    del values["checksum"]
    path.write_text(json.dumps(values))
    code = expand_offline(tmp_path, "source", {"init": "copying"})
    assert_refused(code, capfd.readouterr().err.strip().splitlines(), ["init", "random, zero"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [_truncate, _lose, _no_progress, _no_model])
def test_damaged_checkpoint_is_neither_inspected_nor_expanded(
    finished: Path, tmp_path: Path, capfd: Any, damage: Callable[[Path], str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    saved = "run/checkpoints/step_0000045"
    needed = ["checkpoint:", damage(tmp_path / saved)]
    before = contents(tmp_path)
    for command in (["expand", saved, "out", "--to-layers", "6"], ["inspect", saved]):
        words = [str(tmp_path / word) if word in (saved, "out") else word for word in command]
        code = cli.main(["checkpoint", *words])
        assert_refused(code, capfd.readouterr().err.strip().splitlines(), needed)
    assert contents(tmp_path) == before


def test_a_failing_rank_ends_the_job_with_its_cause(corpus: Path, tmp_path: Path) -> None:
    """A learning rate that diverges: exit code 1, rank and cause on the last line."""
    file = tmp_path / "in.yaml"
    values = run_values(tmp_path, corpus, "run", optim={"name": "adamw", "lr": 1e30})
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "megatron_progressive", "train", str(file), "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("rank ")
    assert "diverged" in last
