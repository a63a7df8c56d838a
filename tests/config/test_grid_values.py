"""Values of a grid's file: text as it was written, and what no grid can have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive.grid.grid import load_grid

GRID = """\
study: {name: 2026-11-28, dir: "$PLACE"}
run:
  model: {family: gpt2, hidden_size: 32}
  data: {corpus: /nothing/here}
  train: {steps: 40, global_batch: 4, micro_batch: 4}
sizes:
- {name: 007, to_layers: 2}
- {name: no, to_layers: 4, optim.lr: 1e-3, data.text_field: 2026-11-28, data.corpus: ~/c}
arms: [fixed, zero_layer]
tau: [0.5, 20]
seeds: [1234567]
"""


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLACE", str(tmp_path / "studies"))
    monkeypatch.setenv("HOME", "/h")
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return path


def test_text_as_it_was_written(grid: Path, tmp_path: Path) -> None:
    found = load_grid(grid)
    assert (found.name, found.folder) == ("2026-11-28", tmp_path / "studies" / "2026-11-28")
    assert [cell.name for cell in found.cells] == [
        f"{size}-{what}-s1234567"
        for size in ("007", "no")
        for what in ("fixed", "zero_layer-tau0.5-random", "zero_layer-tau20-random")
    ]
    config = found.cells[-1].config
    assert (config.optim.lr, config.data.text_field, config.data.corpus) == (
        1e-3,
        "2026-11-28",
        "/h/c",
    )
    assert config.folder.parent == tmp_path / "studies" / "2026-11-28" / "cells"
    assert load_grid(grid, ["study.name=on", "study.retries=3"]).name == "on"


def test_signs_of_other_planes_in_a_path(grid: Path, tmp_path: Path) -> None:
    found = load_grid(grid, [f"study.dir={tmp_path}/😀"])
    assert found.cells[0].config.folder.parts[-4] == "😀"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: 2026-11-28", "name: ../x", "study.name: got '../x'; accepted: a folder's name"),
        ("name: 2026-11-28", f"name: {'x' * 300}", "study.name: got 'xxx"),
        ("name: 2026-11-28", "name: null", "study.name: got null; accepted: text"),
        ('"$PLACE"', '"$NO_SUCH_PLACE"', "study.dir: got '$NO_SUCH_PLACE', whose variable"),
        ('"$PLACE"', "[a]", "study.dir: got ['a']; accepted: text"),
        ('"$PLACE"', '"$PLACE", retries: 1e3', "study.retries: got 1e3; accepted: an integer"),
        ('"$PLACE"', '"$PLACE", retries: null', "study.retries: got null; accepted: an integer"),
        ("name: 007", "name: a/b", "sizes: name: got 'a/b'; accepted: a folder's name"),
        ("name: 007", f"name: {'x' * 200}", "accepted: a folder's name of up to 245 bytes"),
        ("to_layers: 2", "to_layers: two", "sizes: to_layers: got 'two'; accepted: an integer"),
        ("to_layers: 2", "to_layers: .inf", "sizes: to_layers: got .inf; accepted: an integer"),
        ("to_layers: 2", "to_layers: 0", "sizes: to_layers: got 0; accepted: from 1"),
        ("optim.lr: 1e-3", "optim.lr: .nan", "optim.lr: got nan; accepted: from 0"),
        ("optim.lr: 1e-3", "optim.lr: 1, optim.lr: 2", "sizes[1].optim.lr: twice (lines 8 and 8)"),
        ("optim.lr: 1e-3", "optim.lrr: 1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("seeds: [1234567]", "seeds: [.inf]", "seeds: got .inf; accepted: an integer"),
        ("seeds: [1234567]", "seeds: [-1]", "seeds: got -1; accepted: from 0"),
        ("seeds: [1234567]", "seeds: null", "seeds: got null; accepted: a list"),
        ("[0.5, 20]", "[.nan]", "tau: got .nan; accepted: fractions, steps, or pilot"),
        ("[0.5, 20]", "[-0.5]", "tau: got -0.5; accepted"),
        ("[0.5, 20]", "[1e300]", "expansion[0].at: got 1e+300"),
        ("arms: [fixed", "arms: [[fixed]", "arms: got ['fixed']; accepted: fixed"),
        ("arms: [fixed", "arms: [null", "arms: got null; accepted: fixed"),
        ("seeds: [1234567]", "init: [copy]", "init: got 'copy'; accepted: random, copying"),
        (
            "seeds: [1234567]",
            "schedule: [poly]",
            "schedule: got 'poly'; accepted: wsd, cosine, linear",
        ),
        (
            "seeds: [1234567]",
            "expansion: {order: [up]}",
            "expansion.order: got 'up'; accepted: stack",
        ),
        ("seeds: [1234567]", "pilot: {at: .inf}", "--at: got inf"),
        ("seeds: [1234567]", "pilot: {size: [a]}", "pilot.size: got ['a']; accepted: text"),
        ("seeds: [1234567]", "arms: []", "arms: twice (lines 9 and 11)"),
        (GRID, "- a", "holds a list; accepted: a mapping"),
        (GRID, "", "sizes: got none"),
        (GRID, "sizes: &s [*s]", "sizes[0]: got an anchor that holds itself"),
    ],
)
def test_bad_values(grid: Path, tmp_path: Path, capfd: Any, old: str, new: str, said: str) -> None:
    grid.write_text(GRID.replace(old, new))
    assert cli.main(["grid", "run", str(grid)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said.replace("--at", "pilot.at") in line
    assert not (tmp_path / "studies").exists()
