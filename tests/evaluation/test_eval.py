"""Checkpoints evaluated on downstream tasks are what lm-evaluation-harness says by hand."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive.checkpoints.checkpoint import checkpoint_path
from megatron_progressive.evaluation import harness, names
from megatron_progressive.evaluation.results import checksum_of, results_of_run
from tests.huggingface.test_refusals import refused
from tests.jobs import Jobs
from tests.train.small_runs import run_values

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install -e '.[eval]')")
pytest.importorskip("accelerate", reason="accelerate is not installed (pip install -e '.[eval]')")

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("mprog_choices", "mprog_perplexity")
FILES = [f"tests/evaluation/tasks/{name}.yaml" for name in TASKS]
"""Their data has paths from the root of the repository, as the harness has them: from where it is
started."""


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory, jobs: Jobs) -> Path:
    """A run of two ranks that grew, and whose last checkpoint was evaluated beside it."""
    folder = tmp_path_factory.mktemp("evaluated")
    values = run_values(
        folder, corpus, "run",
        data={"vocab_size": 512, "sequence_length": 128, "prepared": str(corpus)},
        train={"steps": 8, "global_batch": 4, "micro_batch": 2, "eval_every": 8, "eval_samples": 8,
               "save_every": 4, "eval_tasks": [str(ROOT / name) for name in FILES],
               "eval_tasks_limit": 20},
        expansion=[{"at": 4, "to_layers": 2, "init": "copying"}],
    )  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    job = jobs.run(2, folder, ["train", str(folder / "run.yaml")])
    assert job.codes == [0, 0], job.output
    assert "waiting for the evaluation of step 8" in job.output[0]
    return folder / "run"


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def metrics_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The metrics of both tasks, as the harness has them."""
    found = [json.loads((folder / f"{name}.limit-20.json").read_text()) for name in TASKS]
    return {name: values["metrics"][name] for name, values in zip(TASKS, found, strict=True)}


OPTIONS = ["--tasks", ",".join(FILES), "--limit", "20", "--device", "cpu"]
HARNESS = (
    "from lm_eval.tasks import manager; manager.__file__ = '/no/tasks/of/its/own.py'\n"
    "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
)
"""``lm_eval`` itself, spared the index of its own 14,000 files of tasks."""


@pytest.mark.usefixtures("at_root")
def test_equal_to_the_harness_by_hand(run: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint, exported = checkpoint_path(run, 8), tmp_path / "exported"
    through_the_run = metrics_of(run / "evaluations" / "step_0000008")
    before = sorted(path.name for path in run.iterdir())
    shutil.rmtree(run / "evaluations" / "step_0000008")
    assert cli.main(["eval", str(run), *OPTIONS]) == 0
    said = capsys.readouterr().out
    assert "bits_per_byte" in said
    assert "acc_norm" in said
    assert sorted(path.name for path in run.iterdir()) == before
    assert cli.main(["export", "hf", str(checkpoint), str(exported)]) == 0
    assert cli.main(["eval", str(exported), *OPTIONS]) == 0
    by_hand = [
        sys.executable, "-c", HARNESS, "--model", "hf", "--model_args", f"pretrained={exported}",
        "--batch_size", "1", *OPTIONS, "--output_path", str(tmp_path / "by_hand.json"),
    ]  # fmt: skip
    subprocess.run(by_hand, check=True, capture_output=True, cwd=ROOT)
    (file,) = tmp_path.glob("by_hand*.json")
    theirs = json.loads(file.read_text())
    expected = {name: theirs["results"][name] for name in TASKS}
    assert through_the_run == expected
    assert metrics_of(run / "evaluations" / "step_0000008") == expected
    assert metrics_of(tmp_path / "exported.evaluations") == expected
    assert 0 < expected["mprog_choices"]["acc,none"] < 1
    result = json.loads((run / "evaluations/step_0000008/mprog_choices.limit-20.json").read_text())
    assert result["checkpoint"]["step"] == 8
    assert result["checkpoint"]["num_layers"] == 2
    assert result["checkpoint"]["checksum"] == checksum_of(checkpoint)
    assert result["task_versions"]["mprog_choices"] == theirs["versions"]["mprog_choices"] == 2.0
    assert result["n_shot"] == {"mprog_choices": 1}
    assert result["n_samples"] == {"mprog_choices": theirs["n-samples"]["mprog_choices"]}
    assert result["versions"]["lm_eval"] == theirs["lm_eval_version"]
    assert result["truncated_requests"] == 0
    weights = hashlib.sha256((exported / "model.safetensors").read_bytes()).hexdigest()
    assert result["model"]["files"]["model.safetensors"] == weights


def test_the_run_and_its_report_have_the_scores(run: Path, tmp_path: Path) -> None:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (scores,) = [event for event in events if event["event"] == "tasks"]
    assert scores["step"] == 8
    assert {step for step, _ in results_of_run(run)} == {8}
    acc = metrics_of(run / "evaluations" / "step_0000008")["mprog_choices"]["acc,none"]
    assert scores["mprog_choices/acc"] == acc
    assert cli.main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    (row,) = [r for r in report["tasks"] if (r["task"], r["metric"]) == ("mprog_choices", "acc")]
    assert (row["run"], row["step"], row["value"], row["settings"]) == ("run", 8, acc, "limit 20")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Downstream tasks" in page
    assert f"{acc:.4f}" in page


@pytest.mark.usefixtures("at_root")
def test_what_is_refused(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import manager

    # an index of its own: the harness's has thousands of files
    (tmp_path / "tasks").mkdir()
    own = {"task": "sciq_small", "tag": ["small_tasks"], "dataset_path": "json",
           "dataset_kwargs": {"data_files": {"test": "/no/such.jsonl"}}, "test_split": "test",
           "output_type": "multiple_choice"}  # fmt: skip
    (tmp_path / "tasks" / "one.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "tasks" / "manager.py"))
    monkeypatch.setattr(names, "_written_names", lambda: iter(["sciq_small"]))

    def command(tasks: str, *more: str) -> list[str]:
        return ["eval", str(checkpoint_path(run, 8)), "--tasks", tasks, *more]

    with monkeypatch.context() as patched:  # before anything of the model is read
        patched.setattr(harness, "plan_evaluation", lambda *_: pytest.fail("it was read"))
        refused(capsys, tmp_path, [*command("sciq_smal"), "--limit", "3"],
                ["--tasks: got sciq_smal", "did you mean sciq_small?"]
                )  # fmt: skip
    refused(capsys, run, command("small_tasks"), ["small_tasks, which cannot be loaded"])
    refused(capsys, run, command("no/such.yaml"), ["no file no/such.yaml"])
    refused(capsys, run, command(",".join([FILES[0]] * 2)), [f"got {FILES[0]} twice"])
    refused(capsys, run, command(FILES[0], "--limit", "1.5"), ["--limit: got '1.5'"])
    refused(capsys, run, command(FILES[0], "--batch-size", "0"), ["--batch-size: got '0'"])
    refused(capsys, tmp_path, ["eval", str(tmp_path), "--tasks", FILES[0]], ["progress.json"])
    absent = {"lm_eval", "accelerate"}
    monkeypatch.setattr(names, "is_installed", lambda name: None if name in absent else name)
    refused(capsys, run, command(FILES[0]),
            ["lm_eval and accelerate is not installed", "megatron_progressive[eval]"])  # fmt: skip
