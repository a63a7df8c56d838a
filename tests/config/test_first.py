"""A first configuration is read back, is what it says, and can be trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_progressive.cli import main
from megatron_progressive.config import load
from megatron_progressive.config.first import first_configuration, size_for
from megatron_progressive.models import FAMILIES, model_shape

TEXT_FAMILIES = [name for name in FAMILIES if name != "resnet"]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@pytest.mark.parametrize(("devices", "memory"), [(0, 0.0), (8, 80.0), (1, 12.0)])
def test_is_a_configuration(tmp_path: Path, family: str, devices: int, memory: float) -> None:
    path = tmp_path / "first.yaml"
    corpus = "my text: it's #1.txt"
    path.write_text(first_configuration("first", family, corpus, size_for(family, devices, memory)))
    config = load(path)
    assert (config.model.family, config.data.corpus, config.run.name) == (family, corpus, "first")
    (expansion,) = config.expansion
    assert model_shape(config).num_layers * 2 == expansion.to_layers
    assert config.expansion_steps()[0] < config.train.steps * (1 - config.schedule.decay)


def test_only_a_large_gpu_gets_a_large_model() -> None:
    assert size_for("llama3", 0, 0.0).preset == "tiny"
    assert size_for("llama3", 1, 12.0).preset == "tiny"
    assert size_for("llama3", 1, 80.0).preset != "tiny"


def test_the_command_writes_one_that_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("text\n" * 1000)
    file = tmp_path / "mine.yaml"
    assert main(["init", str(file), "--corpus", str(tmp_path / "mine.txt")]) == 0
    assert main(["plan", str(file)]) == 0
    assert "mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--family", "llama9"], "--family: got 'llama9'"),
        (["--family", "resnet"], "--family: got 'resnet'"),
        (["--corpus", "nowhere.txt"], "data.corpus: got 'nowhere.txt', which does not exist"),
        ([], "FILE: "),
    ],
)
def test_bad_words_are_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    file = tmp_path / "mine.yaml"
    if not words:
        file.write_text("mine")
    assert main(["init", str(file), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert file.exists() == (not words)
