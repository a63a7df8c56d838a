"""Expanding a checkpoint on disk gives what expanding the running job gives, bit for bit."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_progressive import cli
from megatron_progressive.checkpoints import checkpoint, streamed
from megatron_progressive.checkpoints.checkpoint import read_description
from megatron_progressive.checkpoints.inspection import inspect_checkpoint
from megatron_progressive.config import to_yaml
from megatron_progressive.expansion.offline import expand_checkpoint, plan_expansion
from megatron_progressive.models import model_shape
from tests.disk import small_disk
from tests.engines import on_ranks
from tests.expansion.offline_on_ranks import loaded, saved_and_expanded
from tests.pool import Pool
from tests.train.small_runs import run_config, train_here
from tests.train.test_training import losses

ROOT = Path(__file__).resolve().parents[2]

TARGETS: list[tuple[int, dict[str, int]]] = [(4, {"tensor": 2, "pipeline": 2}), (1, {})]


GROWTHS: list[tuple[int, dict[str, Any], dict[str, int]]] = [
    (0, {"to_layers": 4, "init": "random"}, {}),
    (1, {"to_layers": 4, "init": "random", "optimizer_state": "reset"}, {"tensor": 2}),
    (1, {"to_layers": 4, "init": "copying_zeroL", "optimizer_state": "copy"}, {"tensor": 2}),
    (2, {"to_layers": 6, "init": "copying", "order": "inter", "insert": "top"}, {}),
    (2, {"to_layers": 6, "init": "copying_zeroN", "order": "stack"}, {"pipeline": 2}),
    (2, {"to_layers": 6, "init": "zero"}, {}),
    (4, {"to_layers": 8, "init": "copying", "insert": "middle"}, {}),
    (3, {"to_layers": 5, "init": "copying_zeroL", "block": [1, 2]}, {"tensor": 2}),
]  # fmt: skip


@pytest.mark.parametrize("growth", range(len(GROWTHS)))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon_nsgd"])
def test_equals_the_expansion_in_memory_bit_for_bit(
    pool: Pool, tmp_path: Path, optimizer: str, precision: str, growth: int
) -> None:
    layers, expansion, parallel = GROWTHS[growth]
    words = [
        f"model.num_layers={layers}",
        f"model.tie_embeddings={'true' if growth % 2 else 'false'}",
        f"optim.name={optimizer}",
        f"optim.embeddings={'adamw' if growth % 3 == 0 else 'muon'}",
        f"train.precision={precision}",
        "train.micro_batch=1",
    ]
    check_against_memory(pool, tmp_path, "gpt2", words, layers, expansion, parallel, TARGETS)


FAMILY_GROWTHS: list[tuple[str, int, dict[str, Any], dict[str, int]]] = [
    ("mixtral", 0, {"to_layers": 3, "init": "random"}, {}),
    ("mixtral", 1, {"to_layers": 3, "init": "copying", "optimizer_state": "copy"}, {"expert": 2}),
    ("deepseek_v3", 0, {"to_layers": 3, "init": "random"}, {"tensor": 2}),
    ("deepseek_v3", 1, {"to_layers": 4, "init": "copying"}, {}),
    ("deepseek_v3", 3, {"to_layers": 5, "init": "random"}, {"expert": 2}),
    ("qwen3", 1, {"to_layers": 3, "init": "copying_zeroN"}, {"tensor": 2}),
]


@pytest.mark.parametrize("growth", range(len(FAMILY_GROWTHS)))
def test_every_family_equals_the_expansion_in_memory(
    pool: Pool, tmp_path: Path, growth: int
) -> None:
    family, layers, expansion, parallel = FAMILY_GROWTHS[growth]
    optimizer = ("adamw", "muon_nsgd")[growth % 2]
    words = [f"model.num_layers={layers}", f"optim.name={optimizer}", "train.micro_batch=1",
             f"train.precision={('bf16', 'fp32')[growth % 2]}"]  # fmt: skip
    words += ["model.mtp_layers=1"] if family == "deepseek_v3" else []
    targets = [(4, {"expert": 2, "tensor": 2})] if family != "qwen3" else TARGETS
    check_against_memory(pool, tmp_path, family, words, layers, expansion, parallel, targets)


def check_against_memory(
    pool: Pool,
    tmp_path: Path,
    family: str,
    words: list[str],
    layers: int,
    expansion: dict[str, Any],
    parallel: dict[str, int],
    targets: list[tuple[int, dict[str, int]]],
) -> None:
    config = on_ranks.family_config(
        family, [*words, *(f"parallel.{k}={v}" for k, v in parallel.items())],
        {"at": 2, **expansion},
    )  # fmt: skip
    expected = pool.run(2, saved_and_expanded, config, tmp_path, 2)[0]
    source = checkpoint.checkpoint_path(tmp_path, 2)
    out = tmp_path / "out"
    expand_checkpoint(plan_expansion(source, out, config.expansion[0]))
    for world, target in targets:
        layout = [f"parallel.{k}={v}" for k, v in target.items()]
        changed = on_ranks.family_config(family, [*words, *layout])
        got = pool.run(world, loaded, changed, expansion["to_layers"], out)[0]
        assert set(got) == set(expected)
        assert all(got[key].dtype == expected[key].dtype for key in expected)
        assert [key for key in expected if not torch.equal(got[key], expected[key])] == []
    progress, model = read_description(out)
    assert (progress.step, progress.samples, progress.flops) == (2, 16, 1e6)
    assert (progress.expansions, progress.num_layers) == (1, expansion["to_layers"])
    assert model.depth_history == ((0, layers), (2, expansion["to_layers"]))
    assert model.shape == model_shape(config, expansion["to_layers"])
    # the index agrees with what the engine asked for
    tensors = inspect_checkpoint(out)["tensors"]
    assert {(t["name"], slot) for t in tensors for slot in t["slots"]} == set(expected)


@pytest.mark.parametrize("optimizer", ["adamw", "muon_nsgd"])
def test_resumed_run_is_the_run_that_expanded_in_memory(
    pool: Pool, corpus: Path, tmp_path: Path, optimizer: str, capsys: Any
) -> None:
    words = [f"optim.name={optimizer}", "train.micro_batch=2", "train.keep_checkpoints=0"]
    whole = run_config(tmp_path, corpus, "whole", *words)  # 1 → 4 layers after step 40
    pool.run(2, train_here, whole)
    shallow = run_config(tmp_path, corpus, "shallow", *words, expansion=[])
    pool.run(2, train_here, shallow)
    grown = run_config(tmp_path, corpus, "grown", *words)
    (grown.folder / "checkpoints").mkdir(parents=True)
    (grown.folder / "config.yaml").write_text(to_yaml(grown))
    shutil.copy(shallow.folder / "metrics.jsonl", grown.folder)
    source, out = (checkpoint.checkpoint_path(c.folder, 40) for c in (shallow, grown))
    command = ["checkpoint", "expand", str(source), str(out), "--to-layers", "4"]
    assert cli.main([*command, "--init", "copying"]) == 0
    assert "expand: " in capsys.readouterr().err  # plain lines in a log
    pool.run(2, train_here, grown)
    assert losses(grown.folder) == losses(whole.folder)
    in_memory = checkpoint.checkpoint_path(whole.folder, 60)
    resumed = checkpoint.checkpoint_path(grown.folder, 60)
    assert read_description(resumed)[1] == read_description(in_memory)[1]
    assert read_description(resumed)[1].depth_history == ((0, 1), (40, 4))
    expected = pool.run(1, loaded, grown, 4, in_memory)[0]
    got = pool.run(1, loaded, grown, 4, resumed)[0]
    assert [key for key in expected if not torch.equal(got[key], expected[key])] == []


MEASURED = """
import re, sys
from pathlib import Path
from megatron_progressive import config
from megatron_progressive.expansion import offline
from megatron_progressive.checkpoints import streamed
from megatron_progressive.reshard import initial_values as init
# getrusage's peak would be the parent's, which a new process inherits
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
words = dict(zip(("to_layers", "init", "optimizer_state"), sys.argv[3:]))
source, out = map(Path, sys.argv[1:3])
plan = offline.plan_expansion(source, out, config.expansion_from_words(words))
before = peak()
offline.expand_checkpoint(plan)
largest = max(tensor.nbytes for tensor in plan.tensors.values())
print(plan.nbytes / 2**20, largest / 2**20, peak() - before)
"""


@pytest.mark.parametrize("init", ["random", "copying"])
def test_memory_is_that_of_one_tensor(pool: Pool, tmp_path: Path, init: str) -> None:
    words = ["model.hidden_size=512", "model.num_layers=4", "data.vocab_size=8192",
             "optim.name=adamw"]  # fmt: skip
    pool.run(1, saved_and_expanded, on_ranks.small_config(words), tmp_path, 0)
    source = checkpoint.checkpoint_path(tmp_path, 2)
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out"), "10", init,
               "copy" if init == "copying" else "inherit"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    total, largest, growth = (float(word) for word in done.stdout.split())
    print(f"{init}: {total:.0f} MiB, largest tensor {largest:.0f} MiB, growth {growth:.0f} MiB")
    assert total > 390
    assert largest <= 20
    assert 16 < growth < 120
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def source(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    pool.run(2, saved_and_expanded, on_ranks.small_config(["model.num_layers=1"]), folder, 1)
    return checkpoint.checkpoint_path(folder, 2)


def test_an_expansion_that_fails_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The disk is full in the middle, where there was room at the start."""
    write, calls = streamed.TensorWriter.write, []
    with small_disk(tmp_path / "disk") as disk, contextlib.ExitStack() as until:
        out = disk.folder / "out"
        command = ["checkpoint", "expand", str(source), str(out), "--to-layers", "3"]

        def on_a_disk_that_fills(self: Any, key: Any, tensor: Any) -> None:
            calls.append(key)
            if len(calls) == 8:
                until.enter_context(disk.full())
            write(self, key, tensor)

        monkeypatch.setattr(streamed.TensorWriter, "write", on_a_disk_that_fills)
        assert cli.main(command) == 1
        monkeypatch.undo()
        last = capfd.readouterr().err.strip().splitlines()[-1]
        assert last == f"mprog: {disk.words} while writing {out}"
        until.close()
        assert list(disk.folder.iterdir()) == []
    (tmp_path / "disk").rmdir()
    command[3] = str(tmp_path / "out")
    # a killed one leaves its hidden folder, which the next one replaces
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "__0_0.distcp").write_text("half")
    assert cli.main(command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_large_tensors_are_cut_into_boxes(
    source: Path, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expansion = on_ranks.small_config([], {"at": 2, "to_layers": 4}).expansion[0]
    monkeypatch.setattr(streamed, "_BOX_ELEMENTS", 100)
    expand_checkpoint(plan_expansion(source, tmp_path / "cut", expansion))
    monkeypatch.undo()
    expand_checkpoint(plan_expansion(source, tmp_path / "whole", expansion))
    config = on_ranks.small_config(["parallel.tensor=2"])
    whole = pool.run(2, loaded, config, 4, tmp_path / "whole")[0]
    cut = pool.run(2, loaded, config, 4, tmp_path / "cut")[0]
    assert [key for key in whole if not torch.equal(whole[key], cut[key])] == []
    sizes = [sum(p.stat().st_size for p in (tmp_path / n).iterdir()) for n in ("cut", "whole")]
    assert sizes[0] > sizes[1]
    # every box is saved alone, not with the tensor that it was cut from
    assert sizes[0] < 12 * sizes[1]


def test_inspect(source: Path, capsys: Any) -> None:
    assert cli.main(["checkpoint", "inspect", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["progress"]["step"] == 2
    assert found["model"]["layout"] == "DP=2"
    assert found["model"]["depth_history"] == [[0, 1]]
    embedding = next(t for t in found["tensors"] if t["name"].startswith("embedding.word"))
    assert embedding["slots"]["momentum"] == {
        "shape": [256, 32], "dtype": "float32", "bytes": 256 * 32 * 4
    }  # fmt: skip
    params = 256 * 32 + 16 * 32 + (12 * 32 * 32 + 13 * 32) + 2 * 32
    assert found["totals"]["params"] == params
    assert found["totals"]["bytes"] == 2 * 4 * params  # weight and momentum
    assert cli.main(["checkpoint", "inspect", str(source)]) == 0
    text = capsys.readouterr().out
    assert "1 at the start" in text
    assert "fp32 32.0 KiB" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_inspect_does_not_load_torch(source: Path) -> None:
    code = (
        "import sys; from megatron_progressive import cli;"
        f"code = cli.main(['checkpoint', 'inspect', {str(source)!r}]);"
        "assert code == 0 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
