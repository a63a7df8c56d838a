"""The coordinate check passes with muP and fails without it and with a broken scale."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive.config import ConfigError, from_dict
from megatron_progressive.coordcheck import check as coordinate
from megatron_progressive.models import model_shape
from tests.coordcheck.check_on_ranks import BREAKS, failed_slopes
from tests.jobs import Jobs
from tests.pool import Pool


def values(corpus: Path | None = None, **model: Any) -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "hidden_size": 32}
    data = {"vocab_size": 512, "sequence_length": 32}
    return {
        "model": {"family": "gpt2", "mup": True, **heads, **model},
        "data": {**data, **({"prepared": str(corpus)} if corpus else {})},
        "train": {"global_batch": 8, "micro_batch": 8},
        "optim": {"lr": 0.02},
    }


def failed(pool: Pool, given: dict[str, Any], steps: int = 4, broken: str | None = None) -> Any:
    return pool.run(1, failed_slopes, given, steps, broken)[0]


def test_gpt2_passes_with_mup_and_fails_without(pool: Pool, corpus: Path) -> None:
    assert failed(pool, values(corpus)) == []
    without = failed(pool, values(corpus, mup=False))
    assert ("width", "logits") in without
    assert ("width", "embedding") in without
    assert ("depth", "branches") in without


def test_llama3_passes_with_mup(pool: Pool, corpus: Path) -> None:
    assert failed(pool, values(corpus, family="llama3", num_query_groups=2), steps=16) == []


@pytest.mark.parametrize(
    ("broken", "expected"),
    list(zip(BREAKS, [("width", "logits"), ("depth", "branches")], strict=True)),
)
def test_a_broken_scale_fails(
    pool: Pool, corpus: Path, broken: str, expected: tuple[str, str]
) -> None:
    assert expected in failed(pool, values(corpus), broken=broken)


def test_slopes() -> None:
    assert coordinate.slope([2, 4, 8], [3.0, 6.0, 12.0]) == pytest.approx(1.0)
    assert coordinate.slope([1, 4], [2.0, 1.0]) == pytest.approx(-0.5)
    assert math.isnan(coordinate.slope([2, 4], [1.0, 0.0]))
    assert math.isnan(coordinate.slope([2, 4], [1.0, math.nan]))
    shapes = [("width", w, 1) for w in (2, 4)] + [("depth", 2, d) for d in (1, 2)]
    measured = [
        coordinate.Measurement(w, d, step, quantity, 1.0, math.nan)
        for _, w, d in shapes
        for step in (0, 1)
        for quantity in coordinate.QUANTITIES
    ]
    slopes = coordinate.slopes_of(shapes, measured, 0.2)
    assert {s.passed for s in slopes if s.kind == "change"} == {False}  # no number does not pass
    assert {s.passed for s in slopes if s.kind == "rms"} == {True}


def test_widths_keep_the_width_of_heads() -> None:
    config = from_dict({"model": {"family": "llama3", "num_attention_heads": 8}})
    wide = model_shape(coordinate.sized(config, 128, 3))
    assert (wide.head_dim, wide.num_attention_heads, wide.num_query_groups) == (8, 16, 8)
    assert (wide.hidden_size, wide.ffn_hidden_size, wide.num_layers) == (128, 384, 3)


@pytest.mark.parametrize("text", ["64", "64,64", "a,b", "0,64", "", "64;128"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--widths: got"):
        coordinate.sizes_from_text("--widths", text, [])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--widths", "48,x"], ["--widths: got '48,x'", "64,128"]),
        (["--widths", "36,72"], ["--widths: got 36", "num_attention_heads 4"]),
        (["--depths", "0,2"], ["--depths: got '0,2'", "from 1"]),
        (["--steps", "0"], ["--steps: got '0'", "from 1"]),
        (["data.prepared=/no/such"], ["data.prepared", "/no/such"]),
        (["train.micro_batch=3"], ["train.global_batch: got 8"]),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values()))
    out = tmp_path / "out"
    assert cli.main(["coordcheck", str(file), *words, "--out", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("mprog:")]) == 1
    assert all(part in lines[-1] for part in parts)
    assert not out.exists()


def test_command_writes_figure_and_json_and_says_what_failed(tmp_path: Path, jobs: Jobs) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**values(), "run": {"dir": str(tmp_path)}}))
    out = tmp_path / "out"
    words = ["coordcheck", str(file), "--widths", "32,64", "--depths", "1,2", "--steps", "2"]
    job = jobs.run(1, tmp_path, [*words, "--out", str(out), "--slope", "1e-9"])
    assert job.codes == [1]
    for part in ("coordinate check failed", "random tokens", "3/3 models", "left"):
        assert part in job.output[0]
    written = json.loads((out / "coordcheck.json").read_text())
    assert written["passed"] is False
    assert len(written["slopes"]) == 14
    assert (out / "coordcheck.png").stat().st_size > 10_000
