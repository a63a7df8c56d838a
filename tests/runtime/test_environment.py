"""What ``mprog env`` says."""

from __future__ import annotations

from importlib import metadata

import pytest

from megatron_progressive import cli
from megatron_progressive.runtime import environment

WHOLE = dict.fromkeys(
    ("transformer-engine", "apex", "triton", "deepspeed", "megatron-core", "torch"), "1.0"
)


def test_command_prints_versions_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("- "))
    assert found["megatron-core"] == metadata.version("megatron-core")
    for name in ("python", "torch", "deepspeed", "transformer-engine", "apex", "triton", "devices"):
        assert name in found


def test_each_missing_part_has_one_line_with_the_way_to_get_it() -> None:
    assert environment.missing_lines(WHOLE, ["H200"]) == []
    for name in set(WHOLE) - {"torch"}:
        (line,) = environment.missing_lines({**WHOLE, name: None}, ["H200"])
        assert line.startswith(name)
        assert "pip install" in line or "NVIDIA" in line
    (line,) = environment.missing_lines(WHOLE, [])
    assert line.startswith("a CUDA device")


def test_apex_on_pypi_is_not_nvidias() -> None:
    assert environment.apex_version(lambda name: None) is None
    assert environment.apex_version(lambda name: object()) is not None
