"""How runs end and begin again: with a validation loss, and with nothing lost before that."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive.checkpoints.checkpoint import checkpoints
from megatron_progressive.config import to_yaml
from megatron_progressive.runs.folder import read_metrics
from tests.jobs import Jobs
from tests.train.small_runs import run_config

WORDS = ["train.steps=8", "train.save_every=4", "train.eval_every=8", "train.micro_batch=8",
         "model.num_layers=1"]  # fmt: skip


def arguments(folder: Path, corpus: Path, *words: str) -> list[str]:
    """Of ``mprog`` for the run in ``folder/run``."""
    config = run_config(folder, corpus, "run", *WORDS, *words, expansion=[])
    (folder / "in.yaml").write_text(to_yaml(config))
    return ["train", str(folder / "in.yaml")]


@pytest.fixture(scope="module")
def finished(jobs: Jobs, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    job = jobs.run(1, folder, arguments(folder, corpus))
    assert job.codes == [0], job.output
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=refuse)


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = strict((folder / "summary.json").read_text())
    return values


def validations(folder: Path) -> list[tuple[int, float]]:
    """Those after the start."""
    evals = [e for e in read_metrics(folder) if e["event"] == "eval" and e["step"]]
    return [(e["step"], e["loss"]) for e in evals]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in folder.rglob("*")
    }


def kill_before_the_summary() -> None:
    from megatron_progressive.runs.folder import Recorder

    Recorder.summary = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]


def test_killed_before_the_summary(
    jobs: Jobs, finished: Path, corpus: Path, tmp_path: Path
) -> None:
    words = arguments(tmp_path, corpus)
    job = jobs.run(1, tmp_path, words, (__name__, "kill_before_the_summary", ()))
    assert job.codes == [-signal.SIGKILL]
    assert not (tmp_path / "run" / "summary.json").exists()
    job = jobs.run(1, tmp_path, words)
    assert job.codes == [0], job.output
    wanted = summary(finished)["final_eval_loss"]
    assert summary(tmp_path / "run")["final_eval_loss"] == wanted
    assert validations(tmp_path / "run") == [(8, wanted)]  # not done again
    assert f"validation loss {wanted:.4f}" in job.output[0]


def test_its_validation_is_done_again_where_it_is_not_recorded(
    jobs: Jobs, finished: Path, run: Path, corpus: Path
) -> None:
    (run / "summary.json").unlink()
    kept = [e for e in read_metrics(run) if e["event"] != "eval"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in kept))
    job = jobs.run(2, run.parent, arguments(run.parent, corpus, "train.micro_batch=4"))
    assert job.codes == [0, 0], job.output
    wanted = summary(finished)["final_eval_loss"]
    assert summary(run)["final_eval_loss"] == pytest.approx(wanted, rel=1e-5)  # on two ranks
    assert validations(run) == [(8, summary(run)["final_eval_loss"])]


def test_told_to_stop_where_it_is(jobs: Jobs, run: Path, corpus: Path) -> None:
    """At a step that is no validation's."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step_0000008")
    job = jobs.run(1, run.parent, arguments(run.parent, corpus, "train.stop_after=4"))
    assert job.codes == [0], job.output
    (found,) = validations(run)
    assert found == (4, summary(run)["final_eval_loss"])
    assert summary(run)["steps"] == 4


@pytest.mark.parametrize("text", ["", '{"final_eval', "nan", "null"])
def test_a_summary_without_a_result_is_written_anew(
    jobs: Jobs, finished: Path, run: Path, corpus: Path, text: str
) -> None:
    values = summary(run)
    if text in ("nan", "null"):  # as they have been written
        values["final_eval_loss"] = float("nan") if text == "nan" else None
        text = json.dumps(values)
    (run / "summary.json").write_text(text)
    job = jobs.run(1, run.parent, arguments(run.parent, corpus))
    assert job.codes == [0], job.output
    assert summary(run)["final_eval_loss"] == summary(finished)["final_eval_loss"]
    (said,) = (e["message"] for e in read_metrics(run) if e["event"] == "warning")
    assert "summary.json" in said
    assert said in job.output[0]
    assert "Traceback" not in job.output[0]


def validate_to_nan() -> None:
    from megatron_progressive.engines.megatron.engine import MegatronEngine

    MegatronEngine.evaluate = lambda *_: float("nan")  # type: ignore[assignment, method-assign]


def test_a_validation_that_is_no_number_is_no_result(
    jobs: Jobs, corpus: Path, tmp_path: Path
) -> None:
    words = arguments(tmp_path, corpus)
    for _ in range(2):  # the second finds the last step saved
        job = jobs.run(1, tmp_path, words, (__name__, "validate_to_nan", ()))
        assert job.codes == [1]
        assert "diverged" in job.output[0].strip().splitlines()[-1]
        assert not (tmp_path / "run" / "summary.json").exists()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [e["loss"] for e in map(strict, lines) if e["event"] == "eval"]
    assert losses == [None] * 3  # the start, and the end of both


def fail_to_load() -> None:
    from megatron_progressive.checkpoints import checkpoint

    def fail(*_: Any) -> None:
        raise OSError("a disk that fails")

    checkpoint.load = fail


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_changes_before_the_checkpoint_has_loaded(
    jobs: Jobs, run: Path, corpus: Path, ranks: int
) -> None:
    before = contents(run)
    words = arguments(run.parent, corpus, "train.steps=8", "train.micro_batch=4")
    values = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**values, "steps": 4}))
    before = contents(run)
    job = jobs.run(ranks, run.parent, words, (__name__, "fail_to_load", ()))
    assert job.codes == [1] * ranks
    assert "a disk that fails" in job.output[0]
    assert contents(run) == before


def test_a_damaged_line_is_kept_and_the_others_stay(
    jobs: Jobs, finished: Path, run: Path, corpus: Path
) -> None:
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step_0000008")
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    damaged = lines[2][:30]  # step 2, behind the validation at the start and step 1
    (run / "metrics.jsonl").write_bytes(b"\n".join([*lines[:2], damaged, *lines[3:], b""]))
    job = jobs.run(1, run.parent, arguments(run.parent, corpus))
    assert job.codes == [0], job.output
    steps = [e["step"] for e in read_metrics(run) if e["event"] == "train"]
    assert steps == [1, 3, 4, 5, 6, 7, 8]
    assert "line 3 of metrics.jsonl cannot be read" in job.output[0]
    assert (run / "metrics.damaged").read_bytes() == damaged + b"\n"
    assert summary(run)["final_eval_loss"] == summary(finished)["final_eval_loss"]
    assert [path.name for path in checkpoints(run)] == ["step_0000004", "step_0000008"]
