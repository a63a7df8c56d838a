"""``mprog plan --dry-run``: one rank of many, by torch's allocator, beside what the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_progressive import config as configuration
from megatron_progressive import standin
from megatron_progressive.cli import main
from megatron_progressive.plan.dry_run import DryRank, dry_run
from megatron_progressive.standin import build
from tests.cuda.serve import ROOT

CONFIGS = ROOT / "configs"
WITHIN = 0.10
"""Of the plan's peak."""
LEFT = {"Transformer Engine": 256 << 20, "local": 100 << 20, "torch": 100 << 20}
"""Bytes that may stay after the last engine: cuBLAS's workspaces (Transformer Engine has five of
32 MiB of its own) and the world's own buffers."""
SHIPPED = [
    ("gpt2/124m_progressive.yaml", 8),
    ("gpt2/124m_fixed.yaml", 8),
    ("gpt2/7b_progressive.yaml", 32),
    ("gpt2/7b_fixed.yaml", 32),
    ("llama3/0.25b_progressive.yaml", 8),
    ("llama3/0.5b_progressive.yaml", 8),
    ("llama3/1b_progressive.yaml", 8),
    ("llama3/2b_progressive.yaml", 64),
    ("deepseek_v3/0.2b_progressive.yaml", 8),
    ("deepseek_v3/0.5b_progressive.yaml", 8),
    ("deepseek_v3/671b_progressive.yaml", 1024),
    ("resnet/50_progressive.yaml", 8),
]


@pytest.fixture(autouse=True)
def _where_it_can_be_built() -> None:
    if reason := standin.available():
        pytest.skip(reason)


def dry(name: str, world: int, ranks: list[int] | None, *words: str) -> list[DryRank]:
    return dry_run(configuration.load(str(CONFIGS / name), list(words)), world, ranks)


def check(ranks: list[DryRank]) -> None:
    """Peaks by the plan, and nothing that stays or grows."""
    for one in ranks:
        for phase in one.phases:
            if phase.predicted is not None:
                assert phase.peak < (1 + WITHIN) * phase.predicted
        assert one.left < LEFT[one.layers]
        assert one.communicators_left <= 1
        assert one.groups_left == 1
    for index, phase in enumerate(ranks[0].phases):  # the plan is for the fullest rank
        fullest = max(one.phases[index].peak for one in ranks)
        if phase.predicted is not None and phase.layout.pipeline == 1:
            assert fullest > (1 - WITHIN) * phase.predicted


@pytest.mark.parametrize(
    "name",
    ["gpt2/124m_progressive.yaml", "llama3/1b_progressive.yaml", "resnet/50_progressive.yaml"],
)
def test_memory_is_as_planned(name: str) -> None:
    check(dry(name, 8, [0]))


@pytest.mark.parametrize(
    "name", ["gpt2/124m_progressive", "llama3/1b_progressive", "deepseek_v3/0.2b_progressive"]
)
def test_layers_of_transformer_engine(
    name: str, monkeypatch: pytest.MonkeyPatch, transformer_engine: str
) -> None:
    """Its Python is real; what its kernels would return is allocated."""
    monkeypatch.setenv("PYTHONPATH", transformer_engine)
    ranks = dry(f"{name}.yaml", 8, [0])
    assert ranks[0].layers == "Transformer Engine"
    check(ranks)


def test_two_expansions_of_a_thousand_ranks() -> None:
    """A rank in the middle of 1,024: process groups and communicators as many after each."""
    words = ["expansion=[{at: 0.2, to_layers: 6}, {at: 0.4, to_layers: 12}]"]
    (one,) = dry("gpt2/124m_progressive.yaml", 1024, [512], *words, "train.global_batch=12288")
    assert [phase.num_layers for phase in one.phases] == [0, 6, 12]
    assert len({phase.groups for phase in one.phases}) == 1
    assert len({phase.communicators for phase in one.phases}) == 1
    check([one])


def test_too_small_a_device_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "gpt2" / "124m_progressive.yaml")
    arguments = ["plan", config, "--gpus", "1", "--dry-run"]
    with pytest.raises(configuration.ConfigError, match=r"rank 0 after 'build': .*out of memory"):
        dry_run(configuration.load(config, []), 1, gib=1.0)
    assert main([*arguments, "--gpu", "h100", "--gpu-memory-gib", "1"]) == 2
    assert "Dry run" not in capsys.readouterr().out


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    build.available.cache_clear()
    try:
        code = main(["plan", str(CONFIGS / "gpt2" / "124m_progressive.yaml"), "--dry-run"])
    finally:
        build.available.cache_clear()
    out, error = capsys.readouterr()
    assert code == 2
    assert not out
    assert error.count("\n") == 1
    assert "--dry-run: got none here" in error
    assert "g++, which is not installed" in error


@pytest.mark.cuda_full
@pytest.mark.parametrize(("name", "world"), SHIPPED)
def test_shipped_configuration(name: str, world: int) -> None:
    """The first, a middle and the last rank."""
    check(dry(name, world, None))
