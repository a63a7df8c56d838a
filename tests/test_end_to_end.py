"""All arms, then ``mprog report``: what the demo does, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive.plan.controls import all_controls
from megatron_progressive.runs.folder import read_metrics
from tests.pool import Pool
from tests.train.small_runs import run_config, train_here


def test_all_arms_and_their_report(
    pool: Pool, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progressive = run_config(tmp_path, corpus, "arms", "model.num_layers=0",
                             "expansion.0.init=random", "train.save_every=0")  # fmt: skip
    arms = [progressive, *all_controls(progressive)]
    for arm in arms:
        pool.run(1, train_here, arm)
    out = tmp_path / "report"
    code = cli.main(["report", *(str(arm.folder) for arm in arms), "--out", str(out)])
    printed = capsys.readouterr().out
    assert code == 0
    assert str(out / "report.html") in printed.replace("\n", "")
    summaries = [json.loads((arm.folder / "summary.json").read_text()) for arm in arms]
    own, fixed, short, never = summaries
    for control in (short, never):  # the same total FLOPs, to one of their steps
        one_step = control["total_flops"] / control["steps"]
        assert 0 <= own["total_flops"] - control["total_flops"] <= one_step
    assert own["speedup_flops"] == pytest.approx(fixed["total_flops"] / own["total_flops"])
    gap = 100 * (own["final_eval_loss"] / fixed["final_eval_loss"] - 1)
    assert own["loss_gap_percent"] == pytest.approx(gap)
    lower = own["final_eval_loss"] < short["final_eval_loss"]
    assert (" below the short control" in own["verdict"]) is lower
    lower = own["final_eval_loss"] < never["final_eval_loss"]
    assert (" below 0 layers that never grow" in own["verdict"]) is lower
    assert "Whether growing pays at equal FLOPs is open" in own["verdict"]  # of one seed
    assert json.loads((out / "report.json").read_text())["complete"] is True
    page = (out / "report.html").read_text()
    assert own["verdict"].split(".")[0] in page
    assert 'src="http' not in page
    assert "data:image/png;base64," in page


def test_report_of_what_is_no_run(tmp_path: Path, capfd: Any) -> None:
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_flops_in_metrics_are_the_plans(
    pool: Pool, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_progressive.cost.flops import total_flops

    config = run_config(tmp_path, corpus, "flops", "train.save_every=0")
    pool.run(1, train_here, config)
    last = [e for e in read_metrics(config.folder) if e["event"] == "train"][-1]
    assert last["flops"] == total_flops(config)
