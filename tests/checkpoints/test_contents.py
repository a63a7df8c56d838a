"""A checkpoint that is not what was saved is never taken for one, whatever happened to it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive.checkpoints.checkpoint import (
    checkpoint_path,
    read_description,
    read_whole,
)
from megatron_progressive.checkpoints.contents import DamagedCheckpoint
from megatron_progressive.runs.folder import read_metrics
from tests.pool import Pool
from tests.train.small_runs import run_config, train_here

WORDS = ["train.steps=6", "train.save_every=2", "train.eval_every=6", "train.micro_batch=2",
         "train.keep_checkpoints=1"]  # fmt: skip


@pytest.fixture(scope="module")
def saved(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that has saved three times and lost its summary."""
    folder = tmp_path_factory.mktemp("saved")
    words = [*WORDS, "train.keep_checkpoints=0"]
    config = run_config(folder, corpus, "run", *words, expansion=[])
    assert pool.run(2, train_here, config) == [0, 0]
    (config.folder / "summary.json").unlink()
    return config.folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def flip(path: Path, at: int | None = None) -> None:
    """One bit is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 0x40
    path.write_bytes(content)


def test_a_flipped_bit_anywhere(run: Path) -> None:
    checkpoint = checkpoint_path(run, 6)
    read_whole(checkpoint)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    names = {path.relative_to(checkpoint).as_posix() for path in files}
    assert {
        "tokenizer/tokenizer.json",
        "__0_0.distcp",
        "__1_0.distcp",
        ".metadata",
        "progress.json",
    } <= names
    rng = random.Random(0)
    for name in sorted(names):
        path = checkpoint / name
        content = path.read_bytes()
        for at in (0, len(content) - 2, *(rng.randrange(len(content) - 1) for _ in range(20))):
            flip(path, at)
            with pytest.raises(DamagedCheckpoint, match=rf"step_0000006 is damaged: {name} "):
                read_whole(checkpoint)
            path.write_bytes(content)
    read_whole(checkpoint)


def zeros(checkpoint: Path) -> str:
    path = checkpoint / "__1_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    return "__1_0.distcp does not have the content that was saved (checksum)"


def flipped(checkpoint: Path) -> str:
    flip(checkpoint / "__0_0.distcp")
    return "__0_0.distcp does not have the content that was saved (checksum)"


def truncated(checkpoint: Path) -> str:
    path = checkpoint / "__0_0.distcp"
    os.truncate(path, path.stat().st_size // 2)
    return "__0_0.distcp is truncated to "


def longer(checkpoint: Path) -> str:
    with open(checkpoint / ".metadata", "ab") as file:
        file.write(b"0")
    return ".metadata has "


def missing(checkpoint: Path) -> str:
    (checkpoint / "metadata.json").unlink()
    return "metadata.json is missing"


def of_another(checkpoint: Path) -> str:
    shutil.copy(checkpoint / "__0_0.distcp", checkpoint / "__2_0.distcp")
    return "__2_0.distcp is not one of the files that were saved"


def of_another_step(checkpoint: Path) -> str:
    """The same sizes, other weights."""
    shutil.copy(checkpoint_path(checkpoint.parents[1], 2) / "__0_0.distcp", checkpoint)
    return "__0_0.distcp does not have the content that was saved (checksum)"


def empty(checkpoint: Path) -> str:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    return "progress.json is missing or not readable"


def another_step_claimed(checkpoint: Path) -> str:
    path = checkpoint / "progress.json"
    path.write_text(path.read_text().replace('"step": 6', '"step": 5'))
    return "progress.json does not have the content that was saved (checksum)"


DAMAGES = [zeros, flipped, truncated, longer, missing, of_another, of_another_step, empty,
           another_step_claimed]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_command_takes_it(
    run: Path, tmp_path: Path, capfd: Any, damage: Callable[[Path], str]
) -> None:
    checkpoint = checkpoint_path(run, 6)
    said, out = damage(checkpoint), tmp_path / "out"
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for command in (
        ["checkpoint", "inspect", str(checkpoint)],
        ["checkpoint", "expand", str(checkpoint), str(out), "--to-layers", "3"],
        ["export", "hf", str(checkpoint), str(out)],
    ):
        assert cli.main(command) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert f"{checkpoint} is damaged: {said}" in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def train_or_refuse(config: Any) -> Any:
    try:
        return train_here(config)
    except DamagedCheckpoint as error:
        return str(error)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_the_one_before(
    pool: Pool, corpus: Path, saved: Path, run: Path, damage: Callable[[Path], str]
) -> None:
    said = damage(checkpoint_path(run, 6))
    config = run_config(run.parent, corpus, "run", *WORDS, expansion=[])
    assert pool.run(2, train_or_refuse, config) == [0, 0]
    events = read_metrics(run)
    assert [e["step"] for e in events if e["event"] == "resume"] == [4]
    warnings = [e for e in events if e["event"] == "warning"]
    (warning,) = (e for e in warnings if "is damaged" in e["message"])
    assert warning["message"].startswith(f"{checkpoint_path(run, 6)} is damaged: {said}")
    assert "kept as step_0000006.damaged" in warning["message"]
    # the newest one is kept, that before the decay (for a longer run), and the damaged one
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"step_0000004", "step_0000006", "step_0000006.damaged"}
    read_whole(checkpoint_path(run, 6))

    def losses(folder: Path) -> list[tuple[int, float]]:
        return [(e["step"], e["loss"]) for e in read_metrics(folder) if e["event"] == "train"]

    assert losses(run) == losses(saved)


def test_none_is_whole(pool: Pool, corpus: Path, run: Path) -> None:
    for step, damage in ((2, flipped), (4, truncated), (6, zeros)):
        damage(checkpoint_path(run, step))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    config = run_config(run.parent, corpus, "run", *WORDS, expansion=[])
    said = pool.run(2, train_or_refuse, config)
    assert said[0] == said[1]
    assert f"{checkpoint_path(run, 6)} is damaged: __1_0.distcp does not" in said[0]
    assert "no whole one is before it" in said[0]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_does_not_start_from_it(pool: Pool, corpus: Path, run: Path) -> None:
    source = checkpoint_path(run, 6)
    flipped(source)
    config = run_config(run.parent, corpus, "new", *WORDS, f"run.init_from={source}",
                        expansion=[])  # fmt: skip
    said = pool.run(2, train_or_refuse, config)
    assert said[0] == said[1]
    assert f"{source} is damaged: __0_0.distcp does not have the content" in said[0]
    assert not config.folder.exists()


def without_checksums(checkpoint: Path) -> None:
    """As versions before saved it."""
    path = checkpoint / "progress.json"
    values = json.loads(path.read_text())
    del values["sha256"], values["checksum"]
    path.write_text(json.dumps(values))


def test_checkpoints_of_before_have_sizes_alone(pool: Pool, corpus: Path, run: Path) -> None:
    for step in (2, 4, 6):
        without_checksums(checkpoint_path(run, step))
    read_whole(checkpoint_path(run, 6))
    truncated(checkpoint_path(run, 6))
    with pytest.raises(DamagedCheckpoint, match="is truncated to"):
        read_description(checkpoint_path(run, 6))
    config = run_config(run.parent, corpus, "run", *WORDS, expansion=[])
    assert pool.run(2, train_or_refuse, config) == [0, 0]
    assert [e["step"] for e in read_metrics(run) if e["event"] == "resume"] == [4]
    read_whole(checkpoint_path(run, 6))
    assert "sha256" in json.loads((checkpoint_path(run, 6) / "progress.json").read_text())
