"""The pilot: its two runs, what it refuses, and what it says of made-up and of real ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import cli
from megatron_progressive.compare import run_pilot as pilots
from megatron_progressive.compare.pilot import plan_pilot
from megatron_progressive.compare.run_pilot import run_pilot
from megatron_progressive.config import ConfigError, RunConfig, from_dict, load, to_yaml
from megatron_progressive.cost.flops import step_flops, total_flops
from megatron_progressive.optim.schedule import learning_rate
from megatron_progressive.plan.preflight import check_run
from megatron_progressive.runs.folder import is_finished
from tests.runs.synthetic import write_run


def config_of(folder: Path, **train: Any) -> RunConfig:
    return from_dict(
        {
            "run": {"name": "run", "dir": str(folder)},
            "model": {"family": "gpt2", "num_layers": 0},
            "train": {"steps": 1000, "eval_every": 100, **train},
            "expansion": [{"at": 0.8, "to_layers": 6, "parallel": {"tensor": 2}}],
        }
    )


def test_both_runs_have_the_schedule_of_the_whole_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    pilot = plan_pilot(config)
    assert pilot.folder == tmp_path / "run_pilot"
    for arm, name in ((pilot.fixed, "fixed"), (pilot.progressive, "progressive")):
        assert arm.folder == tmp_path / f"run_pilot_{name}"
        assert (arm.train.steps, arm.last_step, arm.train.eval_every) == (1000, 250, 5)
        rates = [learning_rate(arm, step) for step in range(1, 251)]
        assert rates == [learning_rate(config, step) for step in range(1, 251)]
        assert rates[20:] == [config.optim.lr] * 230  # constant after the warmup
        check_run(arm, 2)
    assert pilot.progressive.expansion_steps() == [20]  # the end of the warmup
    assert pilot.progressive.expansion[0].parallel.tensor == 2
    assert pilot.fixed.parallel.tensor == 2
    assert pilot.fixed.model.num_layers == 6
    assert plan_pilot(config, 300).fixed.last_step == 300
    # a longer pilot continues the shorter one
    longer = plan_pilot(config, 0.5).progressive
    assert replace(longer.train, stop_after=250) == pilot.progressive.train


def test_a_later_expansion_is_a_run_of_its_own(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    early, late = plan_pilot(config), plan_pilot(config, at=0.15)
    assert late.fixed == early.fixed  # which is not trained again
    assert late.progressive.expansion_steps() == [150]
    assert late.progressive.folder == tmp_path / "run_pilot_at150_progressive"
    assert late.folder == tmp_path / "run_pilot_at150"
    assert plan_pilot(config, 500, 150).progressive.expansion == late.progressive.expansion
    check_run(late.progressive, 2)


def test_flops_of_a_run_that_stops_early_are_those_of_its_steps(tmp_path: Path) -> None:
    from megatron_progressive.models import model_shape

    arm = plan_pilot(config_of(tmp_path)).progressive
    small, large = (step_flops(model_shape(arm, depth), arm) for depth in (0, 6))
    assert total_flops(arm) == 20 * small + 230 * large


@pytest.mark.parametrize(
    ("words", "steps", "message"),
    [
        (["expansion=[]"], None, r"^expansion: got none; accepted: one"),
        (["schedule.name=cosine"], None, r"^schedule\.name: got cosine; accepted: wsd"),
        (["train.stop_after=900"], None, r"^train\.stop_after: got 900; accepted: none"),
        (["train.steps=21"], None, r"^train\.steps: got 21, whose stable phase has 18 steps"),
        ([], 30, r"^--steps: got 30; .* from 40 \(20 after .* at step 20\) to 900 \(before"),
        ([], 0.03, r"^--steps: got 0\.03 \(step 30 of 1000\); accepted"),
        ([], 901, r"^--steps: got 901; "),
        ([], 100.5, r"^--steps: got 100\.5; "),
        ([], float("nan"), r"^--steps: got nan; "),
        ([], -1, r"^--steps: got -1; "),
    ],
)
def test_refused(tmp_path: Path, words: list[str], steps: float | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config_of(tmp_path)))
    with pytest.raises(ConfigError, match=message):
        run_pilot(load(path, words), None, steps)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (19, r"^--at: got 19; accepted: a fraction below 1, or a step, from 20 \(the end of the "
             r"warmup\) to 880 \(20 before the decay\)"),
        (0.9, r"^--at: got 0\.9 \(step 900 of 1000\); accepted"),
        (30.5, r"^--at: got 30\.5; "),
        (float("inf"), r"^--at: got inf; "),
        (240, r"^--steps: got 0\.25 \(step 250 of 1000\); .* from 260 \(20 after the expansion at"),
    ],
)  # fmt: skip
def test_an_expansion_too_early_or_late_is_refused(tmp_path: Path, at: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_pilot(config_of(tmp_path), None, None, at)
    assert not list(tmp_path.iterdir())


def test_a_run_too_short_for_any_expansion_is_refused_as_such(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^train\.steps: got 21, whose stable phase has 18 steps"
    ):
        plan_pilot(config_of(tmp_path, steps=21), at=5)


def test_two_expansions_and_impossible_stops_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    twice = replace(config, expansion=[replace(config.expansion[0], at=0.5), *config.expansion])
    with pytest.raises(ConfigError, match=r"^expansion: got 2; accepted: one"):
        plan_pilot(twice)
    for stop in (800, 1001):
        stopped = replace(config, train=replace(config.train, stop_after=stop))
        with pytest.raises(ConfigError, match=rf"^train\.stop_after: got {stop}; .* from 801"):
            check_run(stopped, 2)


def test_it_says_when_the_runs_met_and_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("fixed", "progressive", "at100_progressive")
    ends = {f"run_pilot_{name}": 3.0 for name in names}

    def run_job(config: RunConfig, nproc: int | None, arguments: list[str], apart: bool) -> int:
        assert arguments[0] == "train"
        assert load(arguments[1]) == config
        # the made-up curve's spike is over within a tenth of its steps
        short = replace(config, train=replace(config.train, steps=250, stop_after=None))
        shutil.rmtree(config.folder, ignore_errors=True)
        write_run(short, ends[config.run.name])
        return 0

    monkeypatch.setattr(pilots, "run_job", run_job)
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config_of(tmp_path)))
    assert cli.main(["pilot", str(path), "expansion.0.parallel.tensor=1"]) == 0
    found = json.loads((tmp_path / "run_pilot" / "pilot.json").read_text())
    mixing = found["mixing"]
    assert mixing["mixed"]
    assert mixing["low"] <= mixing["steps"] <= mixing["high"]
    assert found["words"] == [f"expansion.0.at={900 - mixing['steps']}"]
    assert found["tokens"] == mixing["steps"] * 16 * 128
    assert (tmp_path / "run_pilot" / "mixing.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert said.startswith("Mixed ")
    assert found["words"][0] in said
    assert load(path, found["words"]).expansion_steps() == [900 - mixing["steps"]]

    ends["run_pilot_progressive"] = 3.3  # 10 % above at the end
    assert cli.main(["pilot", str(path), "expansion.0.parallel.tensor=1"]) == 0
    found = json.loads((tmp_path / "run_pilot" / "pilot.json").read_text())
    assert (found["words"], found["tokens"], found["proposal"]) == ([], None, None)
    assert 5 < found["mixing"]["gap_left_percent"] < 15
    said = capsys.readouterr().out
    assert said.startswith("Not mixed within")
    assert "had not fallen behind" not in said  # it had, by what made-up runs have before τ

    assert cli.main(["pilot", str(path), "expansion.0.parallel.tensor=1", "--at", "0.1"]) == 0
    found = json.loads((tmp_path / "run_pilot_at100" / "pilot.json").read_text())
    assert found["mixing"]["tau"] == 100


def test_in_a_job_it_names_the_files_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2",
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^environment: got a job of 2 ranks; .*fixed\.yaml and"):
        run_pilot(config_of(tmp_path), None)
    pilot = plan_pilot(config_of(tmp_path))
    assert [load(path) for _, path in pilot.files] == [pilot.fixed, pilot.progressive]


def test_a_stopped_run_is_finished_until_its_stop_is_raised(tmp_path: Path) -> None:
    config = plan_pilot(config_of(tmp_path)).fixed
    assert not is_finished(config)
    config.folder.mkdir()
    (config.folder / "summary.json").write_text(json.dumps({"steps": 250, "final_eval_loss": 1.0}))
    assert is_finished(config)
    assert not is_finished(replace(config, train=replace(config.train, stop_after=300)))
