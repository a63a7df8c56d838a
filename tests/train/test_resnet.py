"""Whole runs of residual networks: any number of ranks, killed and resumed, expanded offline, and
in the same reports as language models."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_progressive import cli
from megatron_progressive import config as configuration
from megatron_progressive.checkpoints.checkpoint import checkpoint_path
from megatron_progressive.checkpoints.init_from import with_initial_model
from megatron_progressive.config import RunConfig, to_yaml
from megatron_progressive.cost.flops import total_flops
from megatron_progressive.plan.controls import all_controls
from tests.data.test_images import image_folder
from tests.expansion.offline_on_ranks import loaded
from tests.expansion.test_atomic import trajectory
from tests.jobs import Jobs
from tests.pool import Pool
from tests.test_bad_input import assert_refused, mprog
from tests.train.small_runs import train_here
from tests.train.test_training import events, largest_difference, losses


def values(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A narrow network on small pictures, as nested values; ``sections`` replace whole ones."""
    return {
        "run": {"name": name, "dir": str(folder)},
        "model": {"family": "resnet", "num_layers": 1, "hidden_size": 8},
        "data": {"image_size": 8},
        "train": {"steps": 24, "global_batch": 24, "micro_batch": 12, "eval_every": 12,
                  "eval_samples": 48, "save_every": 12},
        "expansion": [{"at": 16, "to_layers": 2, "init": "copying"}],
        **sections,
    }  # fmt: skip


def configured(folder: Path, name: str, *words: str, **sections: Any) -> RunConfig:
    return configuration.from_dict(values(folder, name, **sections), words)


@pytest.mark.parametrize(("optimizer", "lr"), [("muon_nsgd", 0.01), ("adamw", 0.003)])
def test_same_curve_on_one_and_two_ranks(
    pool: Pool, tmp_path: Path, optimizer: str, lr: float
) -> None:
    # Micro-batches of one size: others round otherwise, which some steps enlarge a hundredfold, on
    # one rank as well. AdamW divides gradients of nearly 0 by their size: a larger eps.
    curves = {}
    for name, (world, *words) in {
        "one": (1,),
        "two": (2,),
        "replicated_to_divided": (2, "parallel.zero_stage=0", "expansion.0.parallel.zero_stage=1"),
    }.items():  # fmt: skip
        config = configured(tmp_path, name, f"optim.name={optimizer}", f"optim.lr={lr}",
                            "optim.eps=1e-5", "train.save_every=0", *words)  # fmt: skip
        assert set(pool.run(world, train_here, config)) == {0}
        curves[name] = losses(config.folder)
    apart = {name: largest_difference(curves["one"], curve) for name, curve in curves.items()}
    print(optimizer, apart)
    assert max(apart.values()) < 5e-4, apart
    trained = events(tmp_path / "two", "train")
    assert (trained[-1]["tokens"], trained[-1]["num_layers"]) == (24 * 24, 2)  # images
    assert trained[-1]["flops"] == total_flops(
        configured(tmp_path, "two", f"optim.name={optimizer}")
    )


def kill_in_step(victim: int, step: int) -> None:
    from megatron_progressive.engines.torch.engine import TorchEngine

    original, done = TorchEngine.train_step, []

    def counted(self: Any, *args: Any) -> Any:
        done.append(None)
        if len(done) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    if int(os.environ["RANK"]) == victim:
        TorchEngine.train_step = counted  # type: ignore[method-assign]


def test_killed_and_started_again(jobs: Jobs, tmp_path: Path) -> None:
    """Between saves, in the expansion and after it: the bits of an unbroken run."""
    words = ["train.steps=10", "train.save_every=3", "train.eval_every=4"]
    sections = {"expansion": [{"at": 7, "to_layers": 2, "init": "copying",
                               "optimizer_state": "copy"}]}  # fmt: skip
    kills = {
        "whole": [],
        "killed": [(__name__, "kill_in_step", (0, 5)), (__name__, "kill_in_step", (1, 5))],
        "in_the_expansion": [("tests.expansion.test_atomic", "kill_at", (1, "fill")),
                             ("tests.expansion.test_atomic", "kill_at", (0, "agreed"))],
    }  # fmt: skip
    for name, found in kills.items():
        (tmp_path / name).mkdir()
        config = configured(tmp_path / name, "run", *words, **sections)
        file = tmp_path / f"{name}.yaml"
        file.write_text(to_yaml(config))
        for kill in found:
            job = jobs.run(2, tmp_path, ["train", str(file)], kill)
            assert -signal.SIGKILL in job.codes, job.output
        job = jobs.run(2, tmp_path, ["train", str(file)])
        assert job.codes == [0, 0], job.output
        assert trajectory(config.folder) == trajectory(tmp_path / "whole" / "run"), name
    assert len(losses(tmp_path / "whole" / "run")) == 10


def test_saved_expanded_offline_and_inspected(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint that the command makes is what the hook made, on another number of ranks."""
    config = configured(tmp_path, "run", "train.steps=9", "train.save_every=8",
                        expansion=[{"at": 8, "to_layers": 3, "init": "copying"}])  # fmt: skip
    pool.run(2, train_here, config)
    saved, out = checkpoint_path(config.folder, 8), tmp_path / "grown"
    words = ["checkpoint", "expand", str(saved), str(out), "--to-layers", "3", "--init", "copying"]
    assert cli.main(words) == 0
    assert cli.main(["checkpoint", "inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "resnet, basic blocks 3-3-3, channels 8-16-32" in shown
    assert "stages.2.blocks.2.conv2.weight" in shown
    grown = pool.run(1, loaded, config, 3, out)[0]
    # without a learning rate the weights stay those of the checkpoint
    other = with_initial_model(configuration.from_dict({**values(tmp_path, "other", expansion=[]),
                                     "model": {"family": "resnet"},
                                     "run": {"name": "other", "dir": str(tmp_path),
                                             "init_from": str(out)}},
                                    ["train.steps=2", "optim.lr=0"]))  # fmt: skip
    pool.run(1, train_here, other)
    kept = pool.run(2, loaded, other, 3, checkpoint_path(other.folder, 2))[0]
    for key, value in grown.items():
        if key[1] == "param":
            assert torch.equal(kept[key], value), key
    assert cli.main(["export", "hf", str(out), str(tmp_path / "hf")]) == 2
    assert "family resnet" in capsys.readouterr().err


def test_an_image_folder_and_the_report_of_four_arms(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a model without blocks, on pictures of a folder: three classes by their colour."""
    folder = image_folder(tmp_path / "images", ["red", "green", "blue"], each=8)
    progressive = configured(
        tmp_path, "run", "model.num_layers=0", "expansion.0.init=random", "train.steps=30",
        "expansion.0.at=15", "train.eval_every=3", "train.save_every=0",
        data={"corpus": str(folder), "image_size": 8, "num_classes": 3},
    )  # fmt: skip
    arms = [progressive, *all_controls(progressive)]
    for arm in arms:
        pool.run(1, train_here, arm)
    evals = events(arms[1].folder, "eval")
    assert evals[-1]["loss"] < 0.5  # log 3 is 1.1
    assert evals[-1]["tokens"] == 30 * 24
    out = tmp_path / "report"
    assert cli.main(["report", *(str(arm.folder) for arm in arms), "--out", str(out)]) == 0
    page, report = (out / "report.html").read_text(), json.loads((out / "report.json").read_text())
    assert report["complete"] is True
    assert [row["unit"] for row in report["runs"]] == ["images"] * 4
    assert "nats per image" in page
    assert "<th>images</th>" in page
    assert "token" not in page
    assert "images after τ" in page or "did not mix" in page
    assert (out / "gap.png").is_file()
    capsys.readouterr()


def test_a_grid_of_residual_networks(
    jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {
        "study": {"name": "pictures", "dir": str(tmp_path)},
        "run": {"model": {"family": "resnet"}, "data": {"image_size": 8},
                "train": {"steps": 20, "global_batch": 8, "micro_batch": 8, "eval_every": 2,
                          "eval_samples": 16, "save_every": 0}},
        "sizes": [{"name": "w4", "to_layers": 2, "model.hidden_size": 4}],
        "arms": ["fixed", "zero_layer", "one_layer", "short_control", "never_grown"],
        "tau": [0.5],
    }  # fmt: skip
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(grid))
    assert cli.main(["grid", "plan", str(file)]) == 0
    assert cli.main(["grid", "plan", str(file), "data.sequence_length=8"]) == 2
    from megatron_progressive.grid.grid import load_grid

    for cell in load_grid(file).cells:
        path = tmp_path / f"{cell.name}.yaml"
        path.write_text(to_yaml(cell.config))
        assert jobs.run(1, tmp_path, ["train", str(path)]).codes == [0]
    assert cli.main(["grid", "report", str(file)]) == 0
    page = (tmp_path / "pictures" / "report.html").read_text()
    assert "corpus shapes, images of 8 x 8 pixels, 10 classes" in page
    assert "nats per image" in page
    assert "<th>blocks</th>" in page
    assert "2-2-2" in page
    assert "token" not in page.split("The grid file")[0]
    capsys.readouterr()


def test_plan_of_published_networks(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2] / "configs" / "resnet"
    assert cli.main(["plan", str(root / "50_progressive.yaml"), "--nproc", "8"]) == 0
    text = capsys.readouterr().out
    assert "25,557,032" in text
    assert "bottleneck blocks 3-4-6-3, channels 256-512-1024-2048" in text
    assert "224 x 224 pixels, 1,000 classes" in text
    assert "token" not in text
    assert (
        cli.main(["plan", str(root / "50_progressive.yaml"), "--gpu", "h100", "--nproc", "8"]) == 2
    )
    assert "--gpu" in capsys.readouterr().err


# name, key=value words, ranks, what the line must hold
TABLE: list[tuple[str, list[str], int, list[str]]] = [
    ("tensor parallelism", ["parallel.tensor=2"], 2,
     ["parallel.tensor: got 2 with engine torch", "data parallel only", "accepted: 1"]),
    ("pipeline at τ", ["expansion.0.parallel.pipeline=2"], 2,
     ["expansion[0].parallel.pipeline: got 2", "accepted: 1"]),
    ("experts", ["parallel.expert=2"], 2, ["parallel.expert: got 2", "family resnet"]),
    ("another engine", ["parallel.engine=megatron"], 1,
     ["parallel.engine: got 'megatron' for family resnet", "accepted: torch"]),
    ("another engine at τ", ["expansion.0.parallel.engine=deepspeed"], 1,
     ["expansion[0].parallel.engine: got 'deepspeed'", "accepted: torch"]),
    ("ZeRO stage", ["parallel.zero_stage=3"], 1, ["parallel.zero_stage: got 3", "accepted: 0, 1"]),
    ("sequences", ["data.sequence_length=64"], 1,
     ["data.sequence_length: got 64 for family resnet", "accepted: nothing"]),
    ("vocabulary", ["data.vocab_size=64"], 1, ["data.vocab_size: got 64", "accepted: nothing"]),
    ("tokenizer", ["data.tokenizer=gpt2"], 1, ["data.tokenizer: got 'gpt2'", "accepted: nothing"]),
    ("heads", ["model.num_attention_heads=4"], 1, ["model.num_attention_heads: got 4", "resnet"]),
    ("rotary positions", ["model.rope.theta=10"], 1, ["model.rope.theta", "resnet"]),
    ("muP", ["model.mup=true"], 1, ["model.mup: got true", "accepted: false"]),
    ("a kernel", ["kernels.rope=false"], 1, ["kernels.rope: got False", "accepted: nothing"]),
    ("no stages", ["model.resnet.stages=3-0"], 1, ["model.resnet.stages: got '3-0'", "3-4-6-3"]),
    ("unknown block", ["model.resnet.block=wide"], 1, ["model.resnet.block: got 'wide'", "basic"]),
    ("groups", ["model.resnet.groups=3"], 1, ["model.resnet.groups: got 3", "hidden_size 8"]),
    ("unknown preset", ["model.preset=resnet19"], 1,
     ["model.preset: got 'resnet19'", "resnet18, resnet34"]),
    ("no folder", ["data.corpus=/no/images"], 1, ["data.corpus: got /no/images", "train/CLASS"]),
    ("classes", ["data.num_classes=7"], 1, ["data.num_classes: got 7", "accepted: 10"]),
    ("tiny pictures", ["data.image_size=4"], 1, ["data.image_size: got 4", "from 8"]),
    ("smaller than the strides", ["model.preset=resnet18", "model.resnet.groups=4"], 1,
     ["data.image_size: got 8", "from 17", "halves it 5 times"]),
    ("τ after the run", ["expansion.0.at=24"], 1, ["expansion[0].at", "from 1 to 23"]),
    ("same depth", ["expansion.0.to_layers=1"], 1, ["to_layers: got 1", "1 layer"]),
    ("copies of nothing", ["model.num_layers=0"], 1, ["expansion[0].init", "random, zero"]),
    ("batch over ranks", ["train.micro_batch=5"], 2, ["train.global_batch: got 24", "10"]),
]  # fmt: skip


@pytest.mark.parametrize("case", TABLE, ids=[case[0] for case in TABLE])
def test_refused_in_one_line(
    case: tuple[str, list[str], int, list[str]], tmp_path: Path, capfd: Any
) -> None:
    _, words, ranks, needed = case
    runs = tmp_path / "runs"
    code, lines = mprog(values(runs, "run"), tmp_path, words, ranks, capfd)
    assert_refused(code, lines, needed)
    assert not runs.exists()


def test_language_models_have_no_images(tmp_path: Path, capfd: Any) -> None:
    for word, needed in (
        ("data.image_size=32", ["data.image_size: got 32 for family gpt2", "accepted: nothing"]),
        ("model.resnet.groups=4", ["model.resnet.groups", "gpt2"]),
        ("parallel.engine=torch", ["parallel.engine: got 'torch' for family gpt2", "megatron"]),
    ):
        plain = {"run": {"dir": str(tmp_path / "runs")}, "model": {"family": "gpt2"}}
        code, lines = mprog(plain, tmp_path, [word], 1, capfd)
        assert_refused(code, lines, needed)
    assert not (tmp_path / "runs").exists()


def test_the_coordinate_check_is_of_language_models(tmp_path: Path, capfd: Any) -> None:
    file = tmp_path / "in.yaml"
    file.write_text(yaml.safe_dump(values(tmp_path / "runs", "run")))
    assert cli.main(["coordcheck", str(file)]) == 2
    assert "model.family: got 'resnet'" in capfd.readouterr().err
    assert cli.main(["data", "prepare", str(file)]) == 0
    assert "nothing to prepare" in capfd.readouterr().out
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
