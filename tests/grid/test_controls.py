"""A grid of all arms, trained and reported: a run that grows has both controls of equal FLOPs."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_progressive import cli
from megatron_progressive.grid.cells import SCRATCH
from megatron_progressive.grid.grid import load_grid
from megatron_progressive.grid.state import Study
from tests.grid.test_grid import grid_file
from tests.jobs import Jobs

ARMS = ["fixed", "zero_layer", "one_layer", "2_layers", "g_stack", "gradual_stack", "multi_stage",
        "function_preserving", "short_control", "never_grown"]  # fmt: skip


def test_every_run_that_grows_is_judged_by_both_controls(
    jobs: Jobs, tmp_path: Path, corpus: Path
) -> None:
    path = grid_file(
        tmp_path, corpus, arms=ARMS,
        sizes=[{"name": "a", "to_layers": 4, "train.steps": 12, "train.eval_every": 6}],
    )  # fmt: skip
    prepare = ("tests.grid.forked", "prepare", (str(path), None, 0))
    run = jobs.run(1, tmp_path, ["grid", "run", str(path), "--workers", "2"], prepare)
    assert run.codes == [0], run.output
    assert cli.main(["grid", "report", str(path)]) == 0
    study = Study(load_grid(path))
    values = json.loads((study.folder / "report.json").read_text())
    assert values["complete"] is True
    assert values["missing"] == []
    cells = {cell["cell"]: cell for cell in values["cells"]}
    findings = {verdict["run"]: one for one in values["findings"] for verdict in one["verdicts"]}
    grown = [cell for cell in study.grid.cells if cell.arm not in SCRATCH]
    assert {cell.arm for cell in grown} == {*ARMS} - {*SCRATCH}
    for cell in grown:
        mine = [c for c in study.grid.cells if c.control_of == cell.name]
        assert [c.arm for c in mine].count("short_control") == 1
        assert [c.arm for c in mine].count("never_grown") == len(cell.config.expansion)
        for control in mine:  # as the engines counted while they trained
            one_step = cells[control.name]["total_flops"] / control.config.train.steps
            apart = cells[cell.name]["total_flops"] - cells[control.name]["total_flops"]
            assert 0 <= apart < one_step, control.name
        loss = cells[cell.name]["final_eval_loss"]
        short = [cells[c.name]["final_eval_loss"] for c in mine if c.arm == "short_control"]
        never = [cells[c.name]["final_eval_loss"] for c in mine if c.arm == "never_grown"]
        one = findings[cell.run_name]
        gaps = [100 * (loss / min(losses) - 1) for losses in (short, never)]
        assert [round(control["mean"], 9) for control in one["controls"]] == [
            round(gap, 9) for gap in gaps
        ]
        assert one["outcome"] == "open"  # of one seed
        for control, gap in zip(("the short control", "the source never grown"), gaps, strict=True):
            assert f"against {control}: {gap:+.2f} % (one seed decides nothing)" in one["sentence"]
