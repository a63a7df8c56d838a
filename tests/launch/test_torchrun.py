"""launch/torchrun.sh as two nodes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from megatron_progressive.config import to_yaml
from megatron_progressive.runs.folder import read_metrics
from megatron_progressive.runtime.launch import free_port
from tests.launch.staged_runs import ENVIRONMENT, ROOT, resumes, wait_for_step
from tests.train.small_runs import run_config


def test_two_nodes_stop_after_saving_and_go_on(corpus: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path, corpus, "run", "train.steps=12", "train.save_every=0",
                        "expansion.0.at=6", "expansion.0.parallel.tensor=2")  # fmt: skip
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    released = tmp_path / "released"

    def nodes() -> list[subprocess.Popen[bytes]]:
        port = str(free_port())
        return [
            subprocess.Popen(
                [str(ROOT / "launch" / "torchrun.sh"), str(tmp_path / "run.yaml")],
                env={**os.environ, **ENVIRONMENT, "MPROG_NODES": "2", "MPROG_NODE_RANK": str(node),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MPROG_NPROC": "1",
                     "STAGED_SLOW": str(released)},
            )
            for node in range(2)
        ]  # fmt: skip

    started = nodes()
    wait_for_step(config.folder, 2)
    for node in started:
        node.send_signal(signal.SIGTERM)
    assert all(node.wait(600) for node in started)
    released.touch()
    assert [node.wait(600) for node in nodes()] == [0, 0]
    (saved,) = resumes(config.folder)
    assert 2 <= saved < 12
    steps = [e["step"] for e in read_metrics(config.folder) if e["event"] == "train"]
    assert steps == list(range(1, 13))


def test_a_node_says_what_it_lacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "launch" / "torchrun.sh"), "run.yaml"], capture_output=True, text=True,
        env={**os.environ, "MPROG_NODES": "2", "MPROG_PYTHON": sys.executable}, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "MPROG_NODE_RANK: the number of this node, from 0" in done.stderr
