"""The launch scripts against a real Slurm of two nodes on this machine."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_progressive.config import to_yaml
from megatron_progressive.study.grid import load_grid
from megatron_progressive.study.grid_state import Study
from megatron_progressive.train.run_folder import read_metrics
from tests.launch.cluster import Cluster, missing
from tests.study.test_grid import grid_file
from tests.train.cases import run_config

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    bool(missing()), reason=f"Slurm is not installed (no {', '.join(missing())})"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    base = tmp_path_factory.mktemp("slurm", numbered=True)
    cluster = Cluster(base)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


ENVIRONMENT = {"MPROG_PYTHON": sys.executable, "MPROG_HOME": str(ROOT), "PYTHONPATH": str(ROOT),
               "OMP_NUM_THREADS": "1"}  # fmt: skip


def submit(cluster: Cluster, tmp_path: Path, script: str, *arguments: str) -> str:
    path, log = str(ROOT / "launch" / script), f"--output={tmp_path}/job.log"
    return cluster.submit("--nodes=2", log, path, *arguments, cwd=tmp_path, **ENVIRONMENT)


def training_losses(folder: Path) -> list[float]:
    events = [e for e in read_metrics(folder) if e["event"] == "train"]
    assert [e["step"] for e in events] == list(range(1, len(events) + 1))
    return [e["loss"] for e in events]


def wait_for_step(folder: Path, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not any(e.get("step", 0) >= step for e in read_metrics(folder)):
        assert time.monotonic() < deadline, f"{folder} does not reach step {step}"
        time.sleep(0.1)


def test_a_run_on_two_nodes_requeued_and_killed_has_the_same_bits(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    """``scontrol requeue`` in the middle, then SIGKILL of a node's rank: the unbroken losses."""
    words = ["train.steps=80", "train.save_every=10", "train.micro_batch=2",
             "expansion.0.parallel.tensor=2"]  # fmt: skip
    for name in ("whole", "broken"):
        config = run_config(tmp_path, corpus, name, *words)
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
        job = submit(cluster, tmp_path, "train.sh", f"{name}.yaml")
        if name == "broken":
            wait_for_step(config.folder, 15)
            cluster.output("scontrol", "requeue", job)
            cluster.wait(job, {"RUNNING"}, 60)
            wait_for_step(config.folder, 45)
            pids = subprocess.run(
                ["pgrep", "-f", "megatron_progressive train broken.yaml"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            ranks = [int(pid) for pid in pids
                     if "srun" not in Path(f"/proc/{pid}/cmdline").read_text()]  # fmt: skip
            subprocess.run(["kill", f"-{signal.SIGKILL.value}", str(ranks[-1])], check=True)
            cluster.wait(job, {"FAILED", "COMPLETED", "NODE_FAIL"}, 120)
            assert not (config.folder / "summary.json").exists()
            job = submit(cluster, tmp_path, "train.sh", f"{name}.yaml")
        assert cluster.wait(job, {"COMPLETED", "FAILED"}, 200) == "COMPLETED"
    whole, broken = (training_losses(tmp_path / name) for name in ("whole", "broken"))
    assert len(whole) == 80
    assert broken == whole
    (resumes,) = ([e for e in read_metrics(tmp_path / "broken") if e["event"] == "resume"],)
    assert {e["world"] for e in resumes} == {2}


def test_a_grid_on_two_nodes_through_a_warning(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    """The batch script is warned as before the end of its time: it saves, requeues, finishes."""
    path = grid_file(tmp_path, corpus, arms=["fixed", "zero_layer"],
                     sizes=[{"name": "a", "to_layers": 2}])  # fmt: skip
    text = path.read_text().replace("micro_batch: 4", "micro_batch: 2")
    path.write_text(text)
    study = Study(load_grid(path))
    job = submit(cluster, tmp_path, "llama3_scaling.sh", str(path))
    cells = sorted(study.grid.cells, key=lambda cell: cell.flops)
    wait_for_step(cells[0].folder, 2)
    cluster.output("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job, {"COMPLETED", "FAILED"}, 240) == "COMPLETED"
    assert [one.state for one in study.status()] == ["finished"] * 2
    assert all(one.attempts.failures == 0 for one in study.status())
    results = json.loads((study.folder / "results.json").read_text())["cells"]
    assert {row["cell"] for row in results} == {cell.name for cell in cells}
    log = (tmp_path / "job.log").read_text()
    assert "back to the queue" in log
    shutil.rmtree(study.folder)
