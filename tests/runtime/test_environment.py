"""What ``mprog env`` says."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from megatron_progressive import cli
from megatron_progressive.runtime import environment

WHOLE = dict.fromkeys(
    ("transformer-engine", "triton", "deepspeed", "megatron-core", "torch"), "1.0"
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


def test_transformer_engine_of_another_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wheel whose library lacks a symbol of this torch, as far as an import can tell."""
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").touch()
    failing = package / "pytorch" / "__init__.py"
    failing.write_text("raise ImportError('te.so:\\nundefined symbol: _ZN3c10')")
    about = tmp_path / "transformer_engine-2.11.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: transformer_engine\nVersion: 2.11.0\n")
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))

    said = "2.11.0, which cannot be imported (ImportError: te.so: undefined symbol: _ZN3c10)"
    assert cli.main(["env"]) == 0
    assert f"- transformer-engine: {said}: install one that was" in capsys.readouterr().out
    demo = Path(__file__).parents[2] / "configs" / "demo.yaml"
    assert cli.main(["train", str(demo), f"run.dir={tmp_path / 'runs'}"]) == 2
    assert f"mprog: transformer-engine: got {said}; accepted: " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

    def forget() -> None:  # what other tests must not meet
        for name in [n for n in sys.modules if n.partition(".")[0] == "transformer_engine"]:
            del sys.modules[name]

    failing.write_text("")
    forget()
    assert environment.unusable_transformer_engine() is None
    forget()
