"""What cells are called and which of them are one run: labels and folders from the axes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive.config import ConfigError
from megatron_progressive.grid.cell_runs import one_a_run
from megatron_progressive.grid.cells import ARMS
from megatron_progressive.grid.grid import Grid, load_grid
from megatron_progressive.grid.labels import arm_meaning, arm_words, families, is_control
from megatron_progressive.grid.report.report import make_grid_report
from megatron_progressive.grid.state import Study
from megatron_progressive.grid.submit import JobOptions, plan_jobs
from megatron_progressive.grid.text import plan, time_left
from megatron_progressive.laws import fits
from megatron_progressive.laws.rollout import rollout
from tests.grid.report.planted import set_loss
from tests.grid.test_grid import grid_file
from tests.runs.synthetic import write_study


@pytest.fixture(autouse=True, scope="module")
def _few_draws() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for function in (fits.fit_compute, fits.fit_size_tokens, rollout):
            patch.setitem(function.__kwdefaults__, "draws", 20)
        yield


def labels(grid: Grid) -> dict[str, str]:
    """Families by the cells' names without size and seed."""
    return {
        name.partition("-")[2].rpartition("-")[0]: label
        for name, label in families(grid.cells).items()
    }


def test_every_arm_has_words_of_its_own() -> None:
    arms = [*ARMS, "2_layers", "12_layers"]
    assert len({arm_words(arm) for arm in arms}) == len(arms)
    assert len({arm_meaning(arm) for arm in arms}) == len(arms)
    assert (arm_words("12_layers"), arm_words("multi_stage")) == ("12-layer", "multi-stage")


def test_a_label_says_each_axis_that_the_grid_spans(tmp_path: Path) -> None:
    path = grid_file(
        tmp_path, sizes=[{"name": "a", "to_layers": 8}], arms=["fixed", "2_layers", "zero_layer"],
        tau=[0.3, 0.5], init=["random", "copying"], schedule=["wsd", "cosine"],
        expansion={"order": ["stack", "last"], "insert": ["bottom", "top"],
                   "optimizer_state": ["inherit", "copy"]},
    )  # fmt: skip
    found = labels(load_grid(path))
    assert found["fixed"] == "fixed-size wsd"
    assert found["zero_layer-tau0.5-random-inherit-cosine"] == "zero-layer τ=0.5 cosine"
    assert (
        found["2_layers-tau0.3-copying-last-top-copy"]
        == "2-layer τ=0.3 copying last top insert copy state wsd"
    )
    assert found["2_layers-tau0.5-random-top-inherit"] == (
        "2-layer τ=0.5 random top insert inherit state wsd"
    )
    assert len(set(found.values())) == len(found)


def test_a_source_never_grown_is_named_by_the_run_it_controls(tmp_path: Path) -> None:
    """By the stage and not the depth, which two sizes have in different stages."""
    sizes = [{"name": "a", "to_layers": 8}, {"name": "b", "to_layers": 16}]
    arms = ["one_layer", "gradual_stack", "never_grown"]
    grid = load_grid(grid_file(tmp_path, sizes=sizes, arms=arms, tau=[0.3, 0.5]))
    found = families(grid.cells)
    for size, first, second in (("a", 2, 4), ("b", 4, 8)):
        stack = f"{size}-never_grown_of_gradual_stack"
        assert found[f"{stack}_{first}-s1"] == "never-grown of gradual stacking, stage 1"
        assert found[f"{stack}_{second}-s1"] == "never-grown of gradual stacking, stage 2"
        one = f"{size}-never_grown_of_one_layer-tau0.3-copying_1-s1"
        assert found[one] == "never-grown of one-layer τ=0.3"
    assert is_control("never-grown of one-layer", "never_grown")
    assert not is_control("never-grown of one-layer", "short_control")
    assert not is_control("one-layer")


def test_sizes_of_another_kind_are_another_family(tmp_path: Path) -> None:
    """Words make kinds; so do numbers of equally large models that see as much."""

    def sizes(*changes: dict[str, Any]) -> list[set[str]]:
        listed = [{"name": f"n{i}", "to_layers": 2, **one} for i, one in enumerate(changes)]
        grid = load_grid(grid_file(tmp_path, sizes=listed, arms=["fixed", "zero_layer"]))
        found = families(grid.cells)
        return [{found[c.name] for c in grid.cells if c.size == one["name"]} for one in listed]

    plain = {"fixed-size", "zero-layer"}
    wide = {"model.hidden_size": 64}
    # a ladder, whose learning rates and steps go with the size, is one kind
    assert sizes({"optim.lr": 0.02}, {**wide, "optim.lr": 0.01}) == [plain, plain]
    assert sizes({"train.steps": 20}, {"train.steps": 80}) == [plain, plain]
    assert sizes({"to_layers": 4}, {"train.micro_batch": 2}) == [plain, plain]
    assert sizes({"optim.name": "adamw"}, {**wide, "optim.name": "muon_nsgd"}) == [
        {"fixed-size adamw", "zero-layer adamw"}, {"fixed-size muon_nsgd", "zero-layer muon_nsgd"},
    ]  # fmt: skip
    assert sizes({"optim.lr": 0.02}, {"optim.lr": 0.01}) == [
        {"fixed-size lr=0.02", "zero-layer lr=0.02"}, {"fixed-size lr=0.01", "zero-layer lr=0.01"},
    ]  # fmt: skip
    assert sizes({"model.tie_embeddings": True}, {**wide, "model.tie_embeddings": False}) == [
        {f"{one} tie_embeddings={value}" for one in plain} for value in (True, False)
    ]


def test_variants_of_one_seed_are_not_its_seeds(tmp_path: Path) -> None:
    path = grid_file(
        tmp_path, sizes=[{"name": "a", "to_layers": 4}], arms=["fixed", "one_layer"], seeds=[1, 2],
        expansion={"optimizer_state": ["inherit", "copy", "reset"]},
    )  # fmt: skip
    study = Study(load_grid(path))
    write_study(study.grid)
    losses = {"inherit": 3.0, "copy": 3.1, "reset": 3.2}
    for state, loss in losses.items():
        for seed in (1, 2):
            set_loss(study, f"a-one_layer-tau0.5-copying-{state}-s{seed}", loss + 0.01 * seed)
    report = make_grid_report(study)
    found = {one.family: one for one in report.findings}
    assert set(found) == {f"one-layer {state} state" for state in losses}
    assert all(one.seeds == [1, 2] for one in found.values())
    assert report.ablation is not None
    _, rows = report.ablation
    said = {row[5]: row[-1].split()[0] for row in rows}
    assert said == {state: f"{loss + 0.015:.4f}" for state, loss in losses.items()}


def test_arms_that_begin_alike_are_not_averaged(tmp_path: Path) -> None:
    """Zero-layer and multi-stage have the same source, τ and initialisation."""
    arms = ["fixed", "zero_layer", "multi_stage"]
    path = grid_file(
        tmp_path, sizes=[{"name": "a", "to_layers": 4}], arms=arms, init=["random", "copying"],
        schedule=["wsd", "cosine"],
    )  # fmt: skip
    study = Study(load_grid(path))
    write_study(study.grid)
    set_loss(study, "a-zero_layer-tau0.5-random-s1", 3.0)
    set_loss(study, "a-multi_stage-tau0.5-random-s1", 4.0)
    report = make_grid_report(study)
    assert report.ablation is not None
    _, rows = report.ablation
    said = {(row[0], row[2]): row[-1].split()[0] for row in rows if row[7] == "wsd"}
    assert said["zero-layer", "random"] == "3.0000"
    assert said["multi-stage", "random"] == "4.0000"


def shared(tmp_path: Path, **changes: Any) -> Path:
    """Two sources of equal FLOPs, whose short controls are one run; and one run in two arms."""
    return grid_file(
        tmp_path, arms=["fixed", "one_layer", "function_preserving", "short_control"],
        init=["copying", "copying_zeroL"], **changes,
    )  # fmt: skip


def test_cells_of_one_fingerprint_are_one_run(tmp_path: Path, capsys: Any) -> None:
    path = shared(tmp_path)
    study = Study(load_grid(path))
    cells = study.grid.cells
    assert len(cells) == 2 * (1 + 3 + 3)
    assert len({cell.name for cell in cells}) == len(cells)
    for one in cells:
        same = [other for other in cells if other.fingerprint == one.fingerprint]
        assert {other.folder for other in same} == {one.folder}
        assert {other.run_name for other in same} == {f"{same[0].name}-{one.fingerprint}"}
    runs = one_a_run(cells)
    assert len(runs) == 2 * (1 + 2 + 1)
    assert plan_jobs(study, JobOptions())[0].cells == [cell.name for cell in runs]
    said = plan(study.grid)
    assert (
        "a-function_preserving-tau0.5-copying_zeroL-s1 is the run of "
        "a-one_layer-tau0.5-copying_zeroL-s1, which is trained once" in said
    )
    # what is left is of the runs, not of the cells
    write_study(study.grid, skip=["b-"])
    left = time_left(study.status())
    assert left is not None
    rate = [one.flops_per_s or 0.0 for one in study.status() if one.loss is not None]
    flops = sum(cell.flops for cell in runs if cell.size == "b")
    assert left[0] == pytest.approx(flops * len(rate) / sum(rate), rel=1e-6)
    # they count once, and are shown under every name
    report = make_grid_report(study)
    assert [one.family for one in report.findings] == [
        "one-layer copying", "one-layer copying_zeroL", "function-preserving",
    ]  # fmt: skip
    assert "of 2 comparisons" in report.title
    scratch = report.size_token_laws[0]
    assert scratch.cells == ["a-fixed-s1", "a-short_control_of_one_layer-tau0.5-copying-s1"]
    values = json.loads((study.folder / "report.json").read_text())
    assert sum(cell["state"] == "finished" for cell in values["cells"]) == 7
    assert cli.main(["grid", "status", str(path)]) == 0
    assert "a-function_preserving-tau0.5-copying_zeroL-s1" in capsys.readouterr().out


def test_runs_that_never_grow_do_not_depend_on_what_follows_an_expansion(tmp_path: Path) -> None:
    """Growth with and without re-warming has one short control and one source."""
    sizes = [{"name": "a", "to_layers": 4}, {"name": "b", "to_layers": 4, "schedule.rewarm": 0.1}]
    arms = ["fixed", "2_layers", "short_control", "never_grown"]
    grid = load_grid(grid_file(tmp_path, sizes=sizes, arms=arms))
    runs = {size: {c.arm: c.run_name for c in grid.cells if c.size == size} for size in "ab"}
    for arm in arms:
        assert (runs["a"][arm] == runs["b"][arm]) is (arm != "2_layers")
    found = families(grid.cells)
    assert found["b-2_layers-tau0.5-copying-s1"] == "2-layer rewarm=0.1"


def test_a_run_stays_where_it_is_when_the_grid_calls_it_otherwise(tmp_path: Path) -> None:
    before = load_grid(shared(tmp_path))
    write_study(before)
    sizes = [{"name": "renamed", "to_layers": 2}]
    renamed = load_grid(shared(tmp_path, sizes=sizes))
    study = Study(renamed)
    assert all(study.finished(cell) for cell in renamed.cells)
    assert {cell.folder for cell in renamed.cells} < {cell.folder for cell in before.cells}
    # of several folders the finished one
    (cell,) = (cell for cell in renamed.cells if cell.arm == "fixed")
    copy = cell.folder.with_name(f"renamed-fixed-s1-{cell.fingerprint}")
    shutil.copytree(cell.folder, copy)
    (copy / "summary.json").unlink()
    assert load_grid(renamed.file).cells[0].folder == cell.folder
    shutil.rmtree(cell.folder)
    assert load_grid(renamed.file).cells[0].folder == copy


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": [{"name": "a", "to_layers": 2}, {"name": "a", "to_layers": 4}]},
         "sizes: got 2 named a; accepted: a name of its own for each"),
        ({"tau": [0.5, 0.50000001]}, "got two of this name"),
    ],
)  # fmt: skip
def test_no_cell_is_dropped_for_its_name(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_grid(grid_file(tmp_path, **changes))
