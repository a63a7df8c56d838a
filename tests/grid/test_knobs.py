"""Each knob of growth is an axis of a grid: its values differ in what they name and in what they
train, and leave the cells of grids without it as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive.config import ConfigError
from megatron_progressive.grid.cells import Cell
from megatron_progressive.grid.grid import Grid, load_grid
from megatron_progressive.grid.knobs import choices, spread_of
from megatron_progressive.grid.labels import families
from megatron_progressive.grid.report.report import make_grid_report
from megatron_progressive.grid.state import Study
from tests.grid.report.planted import set_loss
from tests.grid.test_grid import grid_file
from tests.runs.synthetic import write_study

DEEP = [{"name": "a", "to_layers": 8}]


def grown(grid: Grid, arm: str) -> list[Cell]:
    return [cell for cell in grid.cells if cell.arm == arm]


# the knob, two of its values, and where the configuration of the cell has them
KNOBS: list[tuple[str, list[Any], str, list[Any]]] = [
    ("order", ["stack", "inter"], "expansion.order", ["stack", "inter"]),
    ("insert", ["bottom", "middle"], "expansion.insert", ["bottom", "middle"]),
    ("block", [None, [1, 3]], "expansion.block", [None, [1, 3]]),
    ("optimizer_state", ["inherit", "copy"], "expansion.optimizer_state", ["inherit", "copy"]),
    ("rewarm", [None, 0.05], "schedule.rewarm", [None, 0.05]),
    ("rewarm_from", [0.0, 0.5], "schedule.rewarm_from", [0.0, 0.5]),
    ("rewarm_layers", ["all", "new"], "schedule.rewarm_layers", ["all", "new"]),
]


def found_at(cell: Cell, key: str) -> Any:
    section, field = key.split(".")
    values = cell.config.expansion[-1] if section == "expansion" else cell.config.schedule
    return getattr(values, field)


@pytest.mark.parametrize(("knob", "values", "key", "wanted"), KNOBS, ids=[k[0] for k in KNOBS])
def test_each_knob_of_an_expansion_is_an_axis(
    tmp_path: Path, knob: str, values: list[Any], key: str, wanted: list[Any]
) -> None:
    spread: dict[str, Any] = {knob: values}
    if knob.startswith("rewarm_"):
        spread["rewarm"] = [0.05]
    path = grid_file(tmp_path, sizes=DEEP, arms=["4_layers"], expansion=spread)
    cells = grown(load_grid(path), "4_layers")
    assert [found_at(cell, key) for cell in cells] == wanted
    assert len({cell.name for cell in cells}) == len({cell.fingerprint for cell in cells}) == 2
    labels = families(cells)
    assert len(set(labels.values())) == 2
    for cell in cells:
        assert cell.axes[knob] in labels[cell.name]
        assert knob not in dict(cell.setting)  # its fixed-size run has none


def test_tau_source_and_init_are_axes_too(tmp_path: Path) -> None:
    path = grid_file(tmp_path, sizes=DEEP, arms=["2_layers", "4_layers"], tau=[0.4, 0.6],
                     init=["copying", "random"])  # fmt: skip
    cells = load_grid(path).cells
    assert len({cell.fingerprint for cell in cells}) == len(cells) == 8
    assert len(set(families(cells).values())) == 8


def test_the_lengths_of_stages_are_an_axis(tmp_path: Path) -> None:
    stages = [[1, 1, 1], [1, 1, 2], [2, 1, 0.5]]
    path = grid_file(tmp_path, sizes=DEEP, arms=["gradual_stack", "never_grown"],
                     expansion={"stages": stages, "rewarm": [None, 0.05]})  # fmt: skip
    grid = load_grid(path)
    cells = grown(grid, "gradual_stack")
    ends = [[one.at for one in cell.config.expansion] for cell in cells[::2]]
    assert ends == [[0.3333, 0.6667], [0.25, 0.5], [0.5714, 0.8571]]
    assert [cell.name for cell in cells[2:4]] == [
        "a-gradual_stack-stages1_1_2-rewarmnone-s1", "a-gradual_stack-stages1_1_2-rewarm0.05-s1",
    ]  # fmt: skip
    labels = families(grid.cells)
    assert labels["a-gradual_stack-stages1_1_2-rewarm0.05-s1"] == (
        "gradual stacking stages 1_1_2 re-warm 0.05"
    )
    never = "a-never_grown_of_gradual_stack-stages1_1_2-rewarm0.05_4-s1"
    assert labels[never] == "never-grown of gradual stacking stages 1_1_2 re-warm 0.05, stage 2"
    # equal stages are the run that grids without the knob have, under whatever name
    plain = load_grid(grid_file(tmp_path, sizes=DEEP, arms=["gradual_stack"]))
    assert plain.cells[0].fingerprint == cells[0].fingerprint
    assert plain.cells[0].name == "a-gradual_stack-s1"


def test_what_makes_no_difference_makes_no_cells(tmp_path: Path) -> None:
    spread = {"block": [None, [0, 1]], "rewarm": [None, 0.05], "rewarm_from": [0.0, 0.5],
              "rewarm_layers": ["all", "new"], "stages": [[1, 1, 1], [1, 2, 3]]}  # fmt: skip
    grid = load_grid(grid_file(tmp_path, sizes=DEEP, arms=["zero_layer", "one_layer", "g_stack"],
                               init=["copying", "random"], expansion=spread))  # fmt: skip
    climbs = 1 + 2 * 2  # none, or from two shares of two kinds of layers
    assert len(grown(grid, "zero_layer")) == len(grown(grid, "g_stack")) == climbs
    assert len(grown(grid, "one_layer")) == 2 * climbs + climbs  # blocks of copies alone
    knobs = spread_of({key: spread[key] for key in ("rewarm", "rewarm_from", "rewarm_layers")})
    assert len(list(choices(knobs, 0, "random"))) == climbs
    prints = [cell.fingerprint for cell in grid.cells]
    assert len(set(prints)) == len(prints)


def test_cells_of_grids_without_new_knobs_stay_what_they_were(tmp_path: Path) -> None:
    """Names and fingerprints as they were before blocks, re-warming and stages were axes."""
    path = grid_file(tmp_path, sizes=DEEP, arms=["2_layers", "g_stack", "gradual_stack"],
                     expansion={"order": ["stack"], "insert": ["top"]})  # fmt: skip
    found = {cell.name: cell.fingerprint for cell in load_grid(path).cells}
    assert found == {
        "a-2_layers-tau0.5-copying-stack-top-s1": "442c824ed811",
        "a-g_stack-s1": "1478eb27c543",
        "a-gradual_stack-s1": "c7c80fb3193d",
    }


@pytest.mark.parametrize(
    ("spread", "said"),
    [
        ({"block": [[1]]}, "expansion.block: got [1]; accepted: a list of blocks [first, last]"),
        ({"block": [1, 3]}, "expansion.block: got 1; accepted: a list of blocks"),
        ({"block": [[0, 0.5]]}, "expansion.block: got 0.5; accepted: an integer"),
        ({"block": [[3, 6]]}, "got [3, 6]; accepted: [first, last] with 0 <= first < last <= 4"),
        ({"block": None}, "expansion.block: got null; accepted: a list"),
        ({"rewarm": [2]}, "expansion.rewarm: got 2.0; accepted: from 0 to 1"),
        ({"rewarm": ["slow"]}, "expansion.rewarm: got 'slow'; accepted: a number, or null"),
        ({"rewarm_layers": ["old"]}, "expansion.rewarm_layers: got 'old'; accepted: all, new"),
        ({"rewarm_from": [0.5]}, "schedule.rewarm_from: got 0.5 without schedule.rewarm"),
        ({"stages": [[1, 1]]}, "got 2 lengths for size a, whose stages have 2, 4, 8 layers"),
        ({"stages": [[1, 0, 1]]}, "expansion.stages: got [1, 0, 1]; accepted: lists of the rel"),
        ({"stages": [1, 1, 1]}, "expansion.stages: got 1; accepted: lists of the relative"),
        ({"height": [1]}, "expansion.height: unknown key; accepted: order, insert, block"),
    ],
)
def test_bad_values_are_one_line(
    tmp_path: Path, capsys: Any, spread: dict[str, Any], said: str
) -> None:
    path = grid_file(tmp_path, sizes=DEEP, arms=["4_layers", "gradual_stack"], expansion=spread)
    assert cli.main(["grid", "run", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "studies").exists()


def test_values_that_names_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    path = grid_file(tmp_path, sizes=DEEP, arms=["4_layers"],
                     expansion={"rewarm": [0.05, 0.05000000001]})  # fmt: skip
    with pytest.raises(ConfigError, match=r"expansion.rewarm: got 0.05 twice"):
        load_grid(path)


def test_variants_are_told_apart_in_the_report(tmp_path: Path) -> None:
    path = grid_file(
        tmp_path, sizes=DEEP, arms=["fixed", "4_layers", "gradual_stack"],
        expansion={"insert": ["middle"], "block": [None, [0, 2]], "rewarm": [None, 0.05],
                   "stages": [[1, 1, 1], [1, 1, 2]]},
    )  # fmt: skip
    study = Study(load_grid(path))
    write_study(study.grid)
    losses = {}
    for index, cell in enumerate(c for c in study.grid.cells if c.config.expansion):
        losses[cell.name] = 3 + index / 100
        set_loss(study, cell.name, losses[cell.name])
    report = make_grid_report(study)
    assert report.ablation is not None
    head, rows = report.ablation
    assert head[6] == "re-warm"
    said = {tuple(row[:-1]): row[-1].split()[0] for row in rows}
    assert len(said) == len(rows) == 2 * 2 * 2
    assert sorted(said.values()) == sorted(f"{loss:.4f}" for loss in losses.values())
    assert {row[6] for row in rows} == {"–", "0.05 from 0, all layers"}
    assert {row[4] for row in rows if row[0] == "4-layer"} == {"middle", "middle [0, 2]"}
