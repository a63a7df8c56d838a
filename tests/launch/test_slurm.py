"""The launch scripts and ``mprog grid submit`` against a real Slurm of two nodes on this machine.

Runs wait for the test (``staged/sitecustomize.py``): nothing depends on how fast the machine is.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_progressive.config import RunConfig, to_yaml
from megatron_progressive.grid.cells import Cell
from megatron_progressive.grid.grid import load_grid
from megatron_progressive.grid.state import Study
from megatron_progressive.runs.folder import read_metrics
from tests.expansion.test_atomic import trajectory
from tests.grid.test_grid import grid_file
from tests.jobs import Jobs
from tests.launch.cluster import Cluster, missing
from tests.launch.staged_runs import ENVIRONMENT, ROOT, resumes, until, wait_for_step
from tests.train.small_runs import run_config

pytestmark = pytest.mark.skipif(
    bool(missing()), reason=f"Slurm is not installed (no {', '.join(missing())})"
)

# Expands at step 12 of 20, from data parallel to tensor parallel; saves every fourth step.
WORDS = ["train.steps=20", "train.save_every=4", "train.eval_every=10", "train.micro_batch=2",
         "expansion.0.at=12", "expansion.0.parallel.tensor=2"]  # fmt: skip

LADDER = ROOT / "configs" / "grids" / "llama3_tiny.yaml"
# One size of it. The learning rate is so small that the pilot, which expands after two steps, has
# mixed at once.
SHORT_LADDER = [
    "sizes=[{name: w32, to_layers: 4, model.hidden_size: 32, model.num_attention_heads: 4}]",
    "data.vocab_size=512", "data.sequence_length=32", "optim.lr=0.001", "train.steps=100",
    "train.global_batch=4", "train.micro_batch=2", "train.eval_every=5", "train.eval_samples=4",
    "train.save_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    base = tmp_path_factory.mktemp("slurm", numbered=True)
    cluster = Cluster(base)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def submit(cluster: Cluster, folder: Path, script: str, *arguments: str, **environment: str) -> str:
    path, log = str(ROOT / "launch" / script), f"--output={folder}/job.log"
    return cluster.submit(
        "--nodes=2", log, path, *arguments, cwd=folder, **{**ENVIRONMENT, **environment}
    )


def train(cluster: Cluster, config: RunConfig, folder: Path, **environment: str) -> str:
    """Submit one run."""
    (folder / "run.yaml").write_text(to_yaml(config))
    return submit(cluster, folder, "train.sh", "run.yaml", **environment)


def log_of(folder: Path) -> str:
    return (folder / "job.log").read_text()


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that broken ones must equal."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = run_config(folder, corpus, "run", *WORDS)
    job = train(cluster, config, folder)
    assert cluster.wait(job, {"COMPLETED", "FAILED"}) == "COMPLETED", log_of(folder)
    assert [e["step"] for e in read_metrics(config.folder) if e["event"] == "train"] == list(
        range(1, 21)
    )
    return config.folder


def test_warned_requeued_and_killed_a_run_has_the_same_bits(
    cluster: Cluster, corpus: Path, unbroken: Path, tmp_path: Path
) -> None:
    """A warning saves; ``scontrol requeue`` and SIGKILL of a rank go back to the last save."""
    config, released = run_config(tmp_path, corpus, "run", *WORDS), tmp_path / "released"
    staged = {"STAGED_SLOW": str(released)}
    job = train(cluster, config, tmp_path, **staged)
    wait_for_step(config.folder, 1)
    cluster.output("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1 does
    until(lambda: "back to the queue" in log_of(tmp_path), "the requeue")
    cluster.wait(job, {"RUNNING"})
    until(lambda: resumes(config.folder), "going on")
    saved = resumes(config.folder)[-1]
    assert 1 <= saved < 4  # by the warning, before any other save

    wait_for_step(config.folder, 6)
    cluster.output("scontrol", "requeue", job)
    until(lambda: "PENDING" in cluster.state(job), "the requeue")
    cluster.wait(job, {"RUNNING"})
    until(lambda: len(resumes(config.folder)) == 2, "going on")
    assert resumes(config.folder)[-1] >= 4

    wait_for_step(config.folder, resumes(config.folder)[-1] + 1)
    os.kill(rank_pids(config)[-1], signal.SIGKILL)
    assert cluster.wait(job, {"FAILED", "COMPLETED", "NODE_FAIL"}) == "FAILED"
    assert not (config.folder / "summary.json").exists()

    released.touch()
    job = train(cluster, config, tmp_path, **staged)
    assert cluster.wait(job, {"COMPLETED", "FAILED"}) == "COMPLETED", log_of(tmp_path)
    assert trajectory(config.folder) == trajectory(unbroken)
    assert {e["world"] for e in read_metrics(config.folder) if e["event"] == "resume"} == {2}


def test_tasks_without_srun_are_refused(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """A batch script has Slurm's variables of several tasks, and runs once. With srun in it, one
    task may also be alone."""
    (tmp_path / "run.yaml").write_text(to_yaml(run_config(tmp_path, corpus, "run", *WORDS)))
    mprog = f"{sys.executable} -m megatron_progressive"
    (tmp_path / "job.sh").write_text(
        f"#!/bin/bash\n{mprog} train run.yaml\necho code $?\n"
        f"srun --ntasks=1 --nodes=1 {mprog} train run.yaml train.stop_after=1\necho code $?\n"
    )
    job = cluster.submit("--nodes=2", "--ntasks=2", f"--output={tmp_path}/job.log", "job.sh",
                         cwd=tmp_path, **ENVIRONMENT)  # fmt: skip
    assert cluster.wait(job, {"COMPLETED", "FAILED"}) == "COMPLETED"
    refused, code, *rest = log_of(tmp_path).splitlines()
    assert refused.startswith("mprog: environment: got SLURM_NTASKS=2 without srun")
    assert code == "code 2"
    assert "train.stop_after: got 1" in rest[0]  # as one rank
    assert not (tmp_path / "run").exists()


def rank_pids(config: RunConfig) -> list[int]:
    """Processes of this run's ranks, which have Slurm's step as their parent."""
    pids = subprocess.run(["pgrep", "-f", "megatron_progressive train run.yaml"],
                          capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    own = str(config.folder.parent)
    return [
        int(pid)
        for pid in pids
        if os.readlink(f"/proc/{pid}/cwd") == own
        and "srun" not in Path(f"/proc/{pid}/cmdline").read_text()
    ]


def ladder_words(folder: Path, corpus: Path, *more: str) -> list[str]:
    return [f"study.dir={folder}/studies", f"data.prepared={corpus}", *SHORT_LADDER, *more]


def assert_same_bits(jobs: Jobs, cell: Cell, folder: Path) -> None:
    """A cell's trajectory is that of a run of its own that nothing breaks off."""
    run = replace(cell.config.run, dir=str(folder / "unbroken"))
    config = replace(cell.config, run=run)
    path = folder / f"{run.name}.yaml"
    path.write_text(to_yaml(config))
    job = jobs.run(2, folder, ["train", str(path)])
    assert job.codes == [0, 0], job.output
    assert trajectory(cell.folder) == trajectory(config.folder)


def test_a_node_that_is_lost_in_the_expansion(
    cluster: Cluster, jobs: Jobs, corpus: Path, tmp_path: Path
) -> None:
    """All processes of a node are killed in the middle of the exchange of a study's cell: Slurm
    queues the job again, and the cell expands again, to the same bits."""
    marker = tmp_path / "expanding"
    words = ladder_words(tmp_path, corpus, "arms=[zero_layer]", "tau=[0.5]")
    job = submit(cluster, tmp_path, "llama3_scaling.sh", str(LADDER), *words,
                 STAGED_PAUSE=str(marker))  # fmt: skip
    study = Study(load_grid(LADDER, words))
    (cell,) = study.grid.cells
    until(marker.exists, "the expansion")
    rank = int(marker.read_text())
    step = int(Path(f"/proc/{rank}/stat").read_text().rsplit(")", 1)[1].split()[1])
    for pid in (step, rank):  # slurmstepd first: nobody is left to tell how the rank ended
        os.kill(pid, signal.SIGKILL)
    node = ("scontrol", "update", "NodeName=127.0.0.2")
    cluster.output(*node, "State=DOWN", "Reason=lost")
    until(lambda: "PENDING" in cluster.state(job), "the requeue")
    assert not any(e["event"] == "expansion" for e in read_metrics(cell.folder))
    cluster.output(*node, "State=RESUME")
    assert cluster.wait(job, {"COMPLETED", "FAILED"}) == "COMPLETED", log_of(tmp_path)
    assert resumes(cell.folder) == [50]
    check_finished(study, {"w32-zero_layer-tau0.5-random-s1"})
    assert_same_bits(jobs, cell, tmp_path)


def small_grid(tmp_path: Path, corpus: Path) -> Path:
    path = grid_file(tmp_path, corpus, arms=["fixed", "zero_layer"],
                     sizes=[{"name": "a", "to_layers": 2}])  # fmt: skip
    # two ranks; no save but those that are asked for
    words = {"micro_batch: 4": "micro_batch: 2", "save_every: 4": "save_every: 0"}
    text = path.read_text()
    for old, new in words.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def check_finished(study: Study, names: set[str]) -> None:
    """All cells ended without a failure, after all their steps, and are in the report."""
    assert {one.state for one in study.status()} == {"finished"}
    assert all(one.attempts.failures == 0 for one in study.status())
    for cell in study.grid.cells:
        steps = [e["step"] for e in read_metrics(cell.folder) if e["event"] == "train"]
        assert steps == list(range(1, cell.config.train.steps + 1))
    results = json.loads((study.folder / "results.json").read_text())["cells"]
    assert {row["cell"] for row in results} == {cell.name for cell in study.grid.cells} == names


def a_clone(folder: Path) -> Path:
    """As ``make install`` leaves it."""
    clone = folder / "clone"
    shutil.copytree(ROOT / "launch", clone / "launch")
    (clone / ".venv").symlink_to(sys.prefix)
    return clone


def test_the_ladder_in_one_job_through_warnings_and_requeue(
    cluster: Cluster, jobs: Jobs, corpus: Path, tmp_path: Path
) -> None:
    """The grid that comes with the code, its pilot, cells and report, in slices shorter than the
    interval of saves: each warning saves, and the job goes on from there. SIGTERM to the ranks
    alone is what preemption sends. Submitted from the clone, with nothing set."""
    released = tmp_path / "released"
    words = ladder_words(tmp_path, corpus, "arms=[fixed, zero_layer]", "tau=[pilot]")
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("MPROG_")}
    job = cluster.submit(
        "--nodes=2", f"--output={tmp_path}/job.log", "launch/llama3_scaling.sh", str(LADDER),
        *words, cwd=a_clone(tmp_path), **environment, STAGED_SLOW=str(released),
    )  # fmt: skip
    pilot = load_grid(LADDER, words).pilot
    assert pilot is not None
    first = min(pilot.cells, key=lambda cell: cell.flops)
    for number, warning in enumerate((("--batch", "--signal=USR1"), ("--signal=TERM",))):
        wait_for_step(first.folder, max([0, *resumes(first.folder)]) + 1)
        cluster.output("scancel", *warning, job)
        until(lambda n=number: log_of(tmp_path).count("back to the queue") == n + 1, "the requeue")
        cluster.wait(job, {"RUNNING"})
        until(lambda n=number: len(resumes(first.folder)) == n + 1, "going on")
    saved = resumes(first.folder)
    assert 1 <= saved[0] < saved[1] < 25
    released.touch()
    until(lambda: all((cell.folder / "summary.json").exists() for cell in pilot.cells), "the pilot")
    released.unlink()
    until(lambda: not any(cell.unknown for cell in load_grid(LADDER, words).cells), "its τ")
    study = Study(load_grid(LADDER, words))
    broken = min(study.grid.cells, key=lambda cell: cell.flops)
    wait_for_step(broken.folder, 1)
    cluster.output("scontrol", "requeue", job)
    until(lambda: "PENDING" in cluster.state(job), "the requeue")
    released.touch()
    assert cluster.wait(job, {"COMPLETED", "FAILED"}) == "COMPLETED", log_of(tmp_path)

    check_finished(study, {"w32-fixed-s1", "w32-zero_layer-taupilot-random-s1"})
    assert resumes(first.folder) == saved
    report = (study.folder / "report.html").read_text()
    assert "Mixed " in study.grid.pilot.finding()
    assert study.grid.pilot.finding() in html.unescape(report)
    for cell in (first, broken):
        assert_same_bits(jobs, cell, tmp_path)


def test_submitted_cells_and_the_report(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """One job a cell, each on a node of its own, and the report after both."""
    path = small_grid(tmp_path, corpus)
    study = Study(load_grid(path, ["train.steps=12"]))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_progressive", "grid", "submit", str(path),
         "--array-limit=2", "--sbatch=--exclusive", "train.steps=12"],
        cwd=tmp_path, env={**cluster.environment, **ENVIRONMENT}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    numbers = dict(line.split(" (")[0].split(": ") for line in done.stdout.splitlines())
    assert numbers.keys() == {"cells", "report"}
    assert cluster.wait(numbers["report"], {"COMPLETED", "FAILED", "CANCELLED"}) == "COMPLETED"
    assert set(cluster.state(numbers["cells"]).split()) == {"COMPLETED"}
    check_finished(study, {"a-fixed-s1", "a-zero_layer-tau0.5-random-s1"})
    tasks = [f"{numbers['cells']}_{index}" for index in range(2)]
    nodes = {cluster.output("squeue", "-h", "-t", "all", "-j", task, "-o", "%N") for task in tasks}
    assert nodes == {"127.0.0.1\n", "127.0.0.2\n"}
    again = subprocess.run(
        [sys.executable, "-m", "megatron_progressive", "grid", "submit", str(path),
         "train.steps=12"],
        cwd=tmp_path, env={**cluster.environment, **ENVIRONMENT}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert again.stdout == "small: every cell has ended, nothing to submit\n"


def test_an_array_prepares_a_corpus(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path, corpus, "run", *WORDS)
    config = replace(config, data=replace(config.data, prepared=None, corpus="stdlib",
                                          max_bytes=300_000))  # fmt: skip
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    cluster.submit("--array=0-1", f"--output={tmp_path}/job-%a.log",
                   str(ROOT / "launch" / "prepare.sh"), "run.yaml", cwd=tmp_path,
                   **ENVIRONMENT)  # fmt: skip
    data = config.folder.parent / "data"
    until(lambda: [*data.glob("stdlib-*/manifest.json")], "the corpus")
    until(lambda: not [*data.glob(".*")], "the parts to be removed")
