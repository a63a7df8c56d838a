"""A study as jobs of Slurm: the pilot, then an array with one task for each cell, then the report.
A crossing study has two arrays: the depths alone, then what waits for their crossing.

Slurm orders these jobs: cells wait for a pilot that succeeds, those around a crossing for the end
of the depths alone, and the report waits for the end of all cells, finished or not. A task that is
warned of its end, is preempted or runs on a node that fails goes back to the queue by itself and on
from its last save (``launch/common.sh``).
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError
from megatron_progressive.grid.cell_runs import one_a_run
from megatron_progressive.grid.cells import Cell
from megatron_progressive.grid.crossing import waited_for
from megatron_progressive.grid.state import NOT_YET, Study
from megatron_progressive.runtime.files import write_atomically, write_json

CLONE = Path(__file__).resolve().parents[2]
"""The root of the clone that the package runs from, which has the launch scripts."""

JOBS_FILE = "jobs.json"
"""The file in the study's folder with every submission, the numbers of its jobs and their cells."""

PILOT_JOB, ALONE_JOB, CELLS_JOB, REPORT_JOB = "pilot", "alone", "cells", "report"
_STEPS = {PILOT_JOB: "pilot", ALONE_JOB: "cell", CELLS_JOB: "cell",
          REPORT_JOB: "report"}  # words of grid_job.sh  # fmt: skip
_COMMAND_SECONDS = 300.0
"""How many seconds a command of Slurm may take; a controller under load answers late."""


@dataclass(frozen=True)
class JobOptions:
    """What the jobs of a study ask for."""

    nodes: int = 1
    """The number of nodes of a cell, and of the pilot."""
    sbatch: str = ""
    """More options of ``sbatch`` for every job, which come after those of ``launch/site.sh``."""
    array_limit: int | None = None
    """The number of cells that run at a time (default: as many as Slurm starts)."""


@dataclass(frozen=True)
class Job:
    """One job that is to be submitted."""

    name: str
    options: list[str]
    """The options of ``sbatch``."""
    script: list[str]
    """The script and its arguments."""
    after: tuple[str, str] | None = None
    """What the job waits for: the kind of the dependency, and the name of the job."""
    cells: list[str] = field(default_factory=list)
    """For the array: the name of the cell of each task, which :attr:`cells_file` tells the task. It
    is not the cell's index in the grid, which another cell may have by the time the task runs."""
    cells_file: Path = Path()
    """For the array: the file with one name on each line."""

    @property
    def cells_text(self) -> str:
        return "".join(f"{name}\n" for name in self.cells)

    def command(self, numbers: Mapping[str, str]) -> list[str]:
        """The command, which is ``sbatch`` and its arguments, where the jobs before this one have
        ``numbers``."""
        after = []
        if self.after is not None:
            kind, name = self.after
            after = [f"--dependency={kind}:{numbers[name]}", "--kill-on-invalid-dep=yes"]
        return ["sbatch", "--parsable", *self.options, *after, *self.script]

    def text(self) -> str:
        """The command as a line of shell that keeps the number in a variable of its name."""
        words = self.command({name: f"${name}" for name in _STEPS})
        quoted = [w if w.startswith("--dependency=") else shlex.quote(w) for w in words]
        return f"{self.name}=$({' '.join(quoted)})"


def site_options() -> list[str]:
    """The options of ``sbatch`` in ``launch/site.sh``, or in the environment."""
    script = f'. {shlex.quote(str(CLONE / "launch" / "site.sh"))}; printf %s "$MPROG_SBATCH"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return shlex.split(done.stdout)


def plan_jobs(study: Study, options: JobOptions) -> list[Job]:
    """The jobs that finish a study; there are none where all of its cells are finished.

    Cells that have failed as often as they are tried are left out, too; ``mprog grid status`` says
    why they failed.

    Raises:
        ConfigError: an option is not accepted, or there are no launch scripts.
    """
    for name, value in (("--nodes", options.nodes), ("--array-limit", options.array_limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: got {value}; accepted: from 1")
    try:
        more = shlex.split(options.sbatch)
    except ValueError as error:
        raise ConfigError(
            f"--sbatch: got {options.sbatch!r}: {error}; accepted: options of sbatch"
        ) from None
    if not (CLONE / "launch" / "grid_job.sh").is_file():
        raise ConfigError(
            f"launch/grid_job.sh: not in {CLONE}; accepted: the package of a clone of its "
            f"repository (pip install --editable)"
        )
    grid = study.grid
    pending = [cell.name for cell in one_a_run(grid.cells) if not _ended(study, cell)]
    if not pending:
        return []
    needed = {cell.run_name for cell in waited_for(grid.crossings, grid.cells)}
    first = {cell.name for cell in grid.cells if cell.run_name in needed}
    arrays = {
        ALONE_JOB: [name for name in pending if name in first],
        CELLS_JOB: [name for name in pending if name not in first],
    }
    site = site_options()

    script = str(CLONE / "launch" / "grid_job.sh")

    def job(name: str, *own: str, first: Sequence[str] = (), **more_fields: Any) -> Job:
        log = f"{name}_%A_%a.log" if name in arrays else f"{name}_%j.log"
        named = [f"--job-name={grid.name}-{name}", f"--output={study.folder / 'jobs' / log}"]
        words = [script, _STEPS[name], *first, str(grid.file), *grid.overrides]
        return Job(name, [*named, *site, *more, *own], words, **more_fields)

    nodes, jobs, after = f"--nodes={options.nodes}", [], None
    if grid.pilot is not None and grid.pilot.mixing() is None:
        jobs.append(job(PILOT_JOB, nodes))
        after = ("afterok", PILOT_JOB)
    limit = "" if options.array_limit is None else f"%{options.array_limit}"
    for name, names in arrays.items():
        if not names:
            continue
        array = f"--array=0-{len(names) - 1}{limit}"
        digits = hashlib.blake2b("\n".join(names).encode(), digest_size=6).hexdigest()
        listed = study.folder / "jobs" / f"cells-{digits}.txt"
        cells = job(name, nodes, array, first=[str(listed)], after=after, cells=names,
                    cells_file=listed)  # fmt: skip
        jobs.append(cells)
        after = ("afterany", name)
    # one task: the site's options may ask for one a GPU
    one = ("--nodes=1", "--ntasks-per-node=1")
    jobs.append(job(REPORT_JOB, *one, after=after))
    return jobs


def _ended(study: Study, cell: Cell) -> bool:
    if cell.unknown:
        return cell.unknown not in NOT_YET
    return study.finished(cell) or study.exhausted(cell)


def as_script(study: Study, jobs: Sequence[Job]) -> list[str]:
    """Lines of shell that do what :func:`submit` does."""
    before = [f"export MPROG_HOME={shlex.quote(str(CLONE))}",
              f"mkdir -p {shlex.quote(str(study.folder / 'jobs'))}"]  # fmt: skip
    lists = [
        f"printf '%s\\n' {shlex.join(job.cells)} > {shlex.quote(str(job.cells_file))}"
        for job in jobs
        if job.cells
    ]
    return [*before, *lists, *(job.text() for job in jobs)]


class SubmissionFailed(RuntimeError):
    """Slurm refused a job; the message is its own."""


def check_slurm() -> None:
    """Check that jobs can be submitted from here.

    Raises:
        ConfigError: there is no ``sbatch``.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch: not found; accepted: a host of a Slurm cluster, or --dry-run")


def submit(study: Study, jobs: Sequence[Job]) -> dict[str, str]:
    """Submit ``jobs`` in order, all or none; returns their numbers by name.

    Raises:
        ConfigError: jobs of the study are in the queue.
        SubmissionFailed: Slurm refused a job; the jobs before it are cancelled.
    """
    _check_queue(study)
    (study.folder / "jobs").mkdir(parents=True, exist_ok=True)
    numbers: dict[str, str] = {}
    for job in jobs:
        if job.cells:
            write_atomically(job.cells_file, job.cells_text)
        done = _run(job.command(numbers))
        if done.returncode:
            if numbers:
                _run(["scancel", *numbers.values()])
            said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise SubmissionFailed(f"{job.name}: {said}")
        # with --parsable: the number, and after a semicolon the cluster where there are several
        numbers[job.name] = done.stdout.strip().splitlines()[-1].split(";")[0]
    tasks = {job.name: dict(enumerate(job.cells)) for job in jobs if job.cells}
    record = {"submitted": [*_submitted(study), {"jobs": numbers, **tasks}]}
    write_json(study.folder / JOBS_FILE, record)
    return numbers


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MPROG_HOME": str(CLONE)}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False,
        timeout=_COMMAND_SECONDS,
    )  # fmt: skip


def _submitted(study: Study) -> list[dict[str, Any]]:
    path = study.folder / JOBS_FILE
    return list(json.loads(path.read_text())["submitted"]) if path.is_file() else []


def _check_queue(study: Study) -> None:
    """Refuse to submit while jobs of the study are in the queue: two jobs of one cell would share
    its folder."""
    numbers = [n for one in _submitted(study) for n in one["jobs"].values()]
    if not numbers:
        return
    # not --jobs: a number that Slurm has forgotten would be an error
    command = ["squeue", "--noheader", "--format=%F", f"--user={getpass.getuser()}"]
    queued = set(_run(command).stdout.split())
    if waiting := sorted(queued & set(numbers), key=int):
        raise ConfigError(
            f"{study.grid.name}: jobs {', '.join(waiting)} of this study are in the queue; "
            f"accepted: once they have ended (scancel {' '.join(waiting)})"
        )
