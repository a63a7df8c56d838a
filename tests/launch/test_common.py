"""launch/common.sh without Slurm: warnings at every moment, a controller that does not answer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each of its first FAILURES calls fails, as under load; all are written down.
SCONTROL = """#!/bin/bash
echo "$@" >> {folder}/scontrol.log
[ "$(wc -l < {folder}/scontrol.log)" -gt {failures} ]
"""

# A run: takes the warning once it is ready, then saves for a while. Nothing is parsed after
# "ready": bash 5.2 loses a signal that comes while it parses $(…).
CHILD = """
trap 'sleep 0.3; echo saved; exit 75' USR1
trap 'echo killed; exit 1' TERM
{
    echo ready
    for i in {1..100}; do sleep 0.1; done
    exit 3
}
"""


def start(folder: Path, body: str, failures: int = 0, **environment: str) -> subprocess.Popen[str]:
    """A job's script that runs ``body`` after sourcing common.sh."""
    scontrol = folder / "scontrol"
    scontrol.write_text(SCONTROL.format(folder=folder, failures=failures))
    scontrol.chmod(0o755)
    (folder / "child.sh").write_text(CHILD)
    script = f"set -euo pipefail\nsource {ROOT}/launch/common.sh\necho sourced\n{body}"
    return subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
             "MPROG_PYTHON": sys.executable, **environment},
    )  # fmt: skip


def warn_after(process: subprocess.Popen[str], line: str, number: signal.Signals) -> str:
    """Send a warning once ``line`` has been printed; returns the rest of the output."""
    assert process.stdout is not None
    for got in process.stdout:
        if got.strip() == line:
            break
    process.send_signal(number)
    return process.communicate(timeout=120)[0]


def requeued(folder: Path) -> list[str]:
    path = folder / "scontrol.log"
    return path.read_text().splitlines() if path.is_file() else []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warned_run_saves_and_is_requeued(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, f"mprog_run bash {tmp_path}/child.sh; echo not reached")
    rest = warn_after(process, "ready", number)
    assert "saved" in rest
    assert "not reached" not in rest
    assert (process.returncode, requeued(tmp_path)) == (75, ["requeue 7"])


def test_a_second_warning_while_it_saves(tmp_path: Path) -> None:
    process = start(tmp_path, f"mprog_run bash {tmp_path}/child.sh")
    assert process.stdout is not None
    assert next(process.stdout).strip() == "sourced"
    assert next(process.stdout).strip() == "ready"
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
        time.sleep(0.05)
    assert "saved" in process.communicate(timeout=120)[0]
    assert (process.returncode, requeued(tmp_path)) == (75, ["requeue 7"])


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("sleep 0.5; mprog_run sleep 60", "sourced"),  # before the command
        ("mprog_run bash -c 'echo on; exec sleep 60'", "on"),  # before the command can take it
    ],
)
def test_warned_before_the_run_can_save(tmp_path: Path, body: str, line: str) -> None:
    process = start(tmp_path, body)
    warn_after(process, line, signal.SIGUSR1)
    assert (process.returncode, requeued(tmp_path)) == (75, ["requeue 7"])


def test_warned_after_the_run(tmp_path: Path) -> None:
    """The rest of the script is done: the job is not failed by its own warning."""
    process = start(tmp_path, "mprog_run true; echo ran; sleep 0.5; echo collected")
    assert "collected" in warn_after(process, "ran", signal.SIGUSR1)
    assert (process.returncode, requeued(tmp_path)) == (0, [])


def test_a_run_that_fails_is_not_requeued(tmp_path: Path) -> None:
    process = start(tmp_path, "mprog_run bash -c 'exit 3'")
    process.communicate(timeout=120)
    assert (process.returncode, requeued(tmp_path)) == (3, [])


def test_a_slow_controller_is_asked_again(tmp_path: Path) -> None:
    process = start(tmp_path, "mprog_run bash -c 'exit 75'", failures=2)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert requeued(tmp_path) == ["requeue 7"] * 3


def test_a_task_of_an_array_requeues_itself_only(tmp_path: Path) -> None:
    """The number of the last task is that of the whole array."""
    process = start(tmp_path, "mprog_run bash -c 'exit 75'",
                    SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")  # fmt: skip
    process.communicate(timeout=120)
    assert requeued(tmp_path) == ["requeue 7_2"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "/home/grid.yaml"),
        ("train.steps=3", "/home/grid.yaml train.steps=3"),
        ("mine.yaml train.steps=3", "mine.yaml train.steps=3"),
    ],
)
def test_the_file_is_optional(tmp_path: Path, words: str, expected: str) -> None:
    body = f'mprog_defaults grid.yaml {words}; echo "${{mprog_words[*]}}"'
    process = start(tmp_path, body, MPROG_HOME="/home")
    assert process.communicate(timeout=60)[0].splitlines()[1] == expected


FLAGSHIP = "llama3_scaling.sh"


def clone_in(folder: Path, venv: str | None) -> Path:
    """A clone with the launch scripts, and a ``.venv`` whose interpreter does ``venv``."""
    clone = folder / "a clone"
    shutil.copytree(ROOT / "launch", clone / "launch")
    if venv is not None:
        python = clone / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/bash\n{venv}\n")
        python.chmod(0o755)
    return clone


def run_script(
    folder: Path, script: str, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A job's script, with a Slurm that answers and an interpreter that prints what it is told."""
    for name, body in {"scontrol": "echo node0", "srun": 'echo srun "$@"'}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("MPROG_", "SLURM_"))}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *words], cwd=folder, capture_output=True, text=True,
        env={**mine, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
             "SLURM_JOB_NODELIST": "node0", **environment}, check=False, timeout=120,
    )  # fmt: skip


FAILS = "echo \"ModuleNotFoundError: No module named 'yaml'\" >&2; exit 1"
SAYS = '[ "$1" = -c ] || echo "$0 $*"'


def test_the_flagship_takes_the_clones_own_interpreter(tmp_path: Path) -> None:
    """As after `make demo`, with nothing set."""
    clone = clone_in(tmp_path, SAYS)
    done = run_script(tmp_path, FLAGSHIP, SLURM_SUBMIT_DIR=str(clone))
    assert (done.returncode, done.stderr) == (0, "")
    python = clone / ".venv" / "bin" / "python"
    run, report = done.stdout.splitlines()
    grid = clone / "configs" / "grids" / "llama3.yaml"
    assert run.startswith(f"{python} -m megatron_progressive grid run --srun srun ")
    assert run.endswith(f" {grid}")
    assert report == f"{python} -m megatron_progressive grid report {grid}"


def test_an_interpreter_that_is_named_goes_before(tmp_path: Path) -> None:
    clone = clone_in(tmp_path, "echo not this one; exit 1")
    mine = tmp_path / "mine"
    mine.write_text(f"#!/bin/bash\n{SAYS}\n")
    mine.chmod(0o755)
    done = run_script(tmp_path, "train.sh", "run.yaml", SLURM_SUBMIT_DIR=str(clone),
                      MPROG_PYTHON=str(mine))  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.strip().endswith(f"{mine} -m megatron_progressive train run.yaml")


@pytest.mark.parametrize(
    ("environment", "shard", "cpus"),
    [
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_CPUS_PER_TASK": "5"},
         "3/8", 5),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MAX": "5", "MPROG_SHARDS": "64",
          "SLURM_CPUS_ON_NODE": "2"}, "5/64", 2),
        ({}, "0/1", 1),
    ],
)  # fmt: skip
def test_a_task_of_an_array_prepares_its_share(
    tmp_path: Path, environment: dict[str, str], shard: str, cpus: int
) -> None:
    clone = clone_in(tmp_path, SAYS)
    done = run_script(tmp_path, "prepare.sh", "run.yaml", "data.max_bytes=9",
                      SLURM_SUBMIT_DIR=str(clone), **environment)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    python = clone / ".venv" / "bin" / "python"
    assert done.stdout.strip() == (
        f"srun --kill-on-bad-exit=0 --wait=60 --ntasks=1 --cpus-per-task={cpus} {python} -m "
        "megatron_progressive data prepare run.yaml data.max_bytes=9 "
        f"--shard {shard} --workers {cpus}"
    )


@pytest.mark.parametrize(
    "script", ["llama3_scaling.sh", "train.sh", "gpt2_7b.sh", "prepare.sh", "torchrun.sh"]
)
@pytest.mark.parametrize("venv", [None, FAILS])
def test_an_interpreter_without_the_package_is_said_first(
    tmp_path: Path, script: str, venv: str | None
) -> None:
    clone = clone_in(tmp_path, venv)
    python = tmp_path / "python3"
    python.write_text(
        "#!/bin/bash\necho \"ModuleNotFoundError: No module named 'yaml'\" >&2; exit 1"
    )
    python.chmod(0o755)
    if script == "torchrun.sh":  # it runs where it is
        done = subprocess.run(
            ["bash", str(clone / "launch" / script), "run.yaml"], capture_output=True, text=True,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=False,
        )  # fmt: skip
    else:
        done = run_script(tmp_path, script, "run.yaml", SLURM_SUBMIT_DIR=str(clone))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    got = "python3" if venv is None else clone / ".venv" / "bin" / "python"
    assert line.startswith(f"MPROG_PYTHON: got {got}, which cannot run megatron_progressive")
    assert "(ModuleNotFoundError: No module named 'yaml'); accepted: " in line
    assert "launch/site.sh" in line


def test_a_container_has_an_interpreter_of_its_own(tmp_path: Path) -> None:
    clone = clone_in(tmp_path, "exit 1")
    done = run_script(tmp_path, "train.sh", "run.yaml", SLURM_SUBMIT_DIR=str(clone),
                      MPROG_SRUN="srun --container-image=nemo")  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.strip().endswith("python3 -m megatron_progressive train run.yaml")


def test_a_script_that_does_not_find_the_clone(tmp_path: Path) -> None:
    done = run_script(tmp_path, FLAGSHIP, SLURM_SUBMIT_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"{tmp_path} is not the clone: submit from the clone, or set MPROG_HOME to it\n"
    )
    done = run_script(tmp_path, FLAGSHIP)
    assert done.returncode != 0
    assert "submit this script with sbatch" in done.stderr
