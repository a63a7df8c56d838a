"""Every grid that comes with the code, reported: each arm named, each label one recipe. Runs are
made up (``synthetic``), but for two grids whose cells really train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_progressive import cli
from megatron_progressive.compare import drawing, mixing
from megatron_progressive.grid.grid import load_grid
from megatron_progressive.grid.labels import arm_words
from megatron_progressive.grid.report.judged import GridReport
from megatron_progressive.grid.report.report import make_grid_report
from megatron_progressive.grid.state import Study
from megatron_progressive.laws import fits
from megatron_progressive.laws.rollout import rollout
from tests.jobs import Jobs
from tests.runs.synthetic import write_study

GRIDS = sorted((Path(__file__).parents[2] / "configs" / "grids").glob("*.yaml"))
# Runs of as many steps as have every phase and enough validations.
SHORT = ["train.steps=100", "train.eval_every=5"]
# In a crossing study steps follow from FLOPs.
FEW = {"crossing_tiny": ["crossing.budgets=[1e11,2e11,4e11,8e11]"]}
CROSSING = 3e11


@pytest.fixture(autouse=True, scope="module")
def _few_draws() -> Iterator[None]:
    """Bootstraps of few samples and coarse pictures: neither is what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DPI", 30)
        for function in (fits.fit_compute, fits.fit_size_tokens, rollout, mixing.mixing_time):
            patch.setitem(function.__kwdefaults__, "draws", 5)
        yield


def check_labels(report: GridReport) -> None:
    """A label is of cells that differ in their size and seed alone, and each arm has one."""
    recipes: dict[str, set[str]] = {}
    for result in report.results:
        cell = result.cell
        recipes.setdefault(result.family, set()).add(f"{cell.arm} {dict(cell.axes)}")
        if cell.control_of is None:
            assert result.family.startswith(arm_words(cell.arm))
    assert all(len(found) == 1 for found in recipes.values()), recipes
    page = (report.grid.folder / "report.html").read_text()
    for arm in {result.cell.arm for result in report.results}:
        assert f"<li>{arm_words(arm)}: " in page
    for one in report.findings:
        assert len(set(one.seeds)) == len(one.seeds), one.family
    assert len({(one.size, one.family) for one in report.findings}) == len(report.findings)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_grid_has_a_report(path: Path, tmp_path: Path) -> None:
    study = Study(load_grid(path, [f"study.dir={tmp_path}", *SHORT, *FEW.get(path.stem, [])]))
    write_study(study.grid, crossing=CROSSING)
    if study.grid.crossings:  # now it is known where the depths cross
        study = Study(study.grid.reloaded())
        write_study(study.grid)
        assert not any(cell.unknown for cell in study.grid.cells)
    report = make_grid_report(study)
    check_labels(report)
    grown = [r for r in report.results if r.cell.config.expansion and not r.cell.unknown]
    assert len({(r.cell.size, r.family) for r in grown}) == len(report.findings)
    assert {r.family for r in report.results} == {law.family for law in report.laws}


# Every axis of the grid, in models and runs as small as have all of its phases.
TINY = [
    "model.hidden_size=32", "model.num_attention_heads=2", "data.vocab_size=512",
    "data.sequence_length=32", "train.steps=10", "train.global_batch=4", "train.micro_batch=4",
    "train.eval_every=1", "train.eval_samples=4", "train.save_every=0",
]  # fmt: skip


@pytest.mark.parametrize("name", ["ablation_multi_stage_tiny", "ablation_order_tiny"])
def test_a_grid_runs_and_has_a_report(jobs: Jobs, tmp_path: Path, corpus: Path, name: str) -> None:
    path = Path(__file__).parents[2] / "configs" / "grids" / f"{name}.yaml"
    words = [f"study.dir={tmp_path}", f"data.prepared={corpus}", *TINY]
    prepare = ("tests.grid.forked", "prepare", (str(path), None, 0))
    run = jobs.run(1, tmp_path, ["grid", "run", str(path), "--workers", "2", *words], prepare)
    assert run.codes == [0], run.output
    assert cli.main(["grid", "report", str(path), *words]) == 0
    report = make_grid_report(Study(load_grid(path, words)))
    assert report.complete
    check_labels(report)
    # one start a run, whatever the number of its names
    starts = [line for line in run.output[0].splitlines() if ": starts (" in line]
    assert len(starts) == len({result.cell.fingerprint for result in report.results})
