"""``mprog train``: check everything, then join the job or start local workers."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from typing import Any

from megatron_progressive import data
from megatron_progressive.checkpoints.checkpoint import (
    TrainingPosition,
    checkpoint_path,
    read_description,
)
from megatron_progressive.checkpoints.contents import DamagedCheckpoint
from megatron_progressive.checkpoints.init_from import check_tokenizer, unknown_tokenizer
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.config.places import check_writable
from megatron_progressive.engines.megatron.kernel_checks import check_kernels
from megatron_progressive.evaluation.background import (
    Evaluations,
    check_eval_tasks,
    evaluations,
)
from megatron_progressive.plan.preflight import check_run, transformer_phases
from megatron_progressive.runs.folder import look, record_late
from megatron_progressive.runs.sole_job import check_free, sole_job
from megatron_progressive.runs.trackers import check_trackers
from megatron_progressive.runtime.distributed import (
    Place,
    place_from_environment,
    prepare_imports,
    world_group,
)
from megatron_progressive.runtime.files import WriteFailed
from megatron_progressive.runtime.launch import run_workers
from megatron_progressive.runtime.leader import Leader, LeaderFailed
from megatron_progressive.runtime.numerics import deterministic_kernels
from megatron_progressive.runtime.signals import outlives_its_reader


def run_job(config: RunConfig, nproc: int | None, arguments: list[str], apart: bool = False) -> int:
    """Train; returns the exit code.

    Under torchrun or Slurm this process is one rank of the job. Otherwise ``nproc`` local workers
    are started with ``arguments`` (those of ``mprog``). A single rank runs in this process, unless
    ``apart`` asks for a worker, so that several runs in a row share no process.

    Raises:
        ConfigError: the run cannot be trained; this is raised before any process group or file is
            created.
    """
    place = place_from_environment()
    if place is not None and nproc is not None and place.world != nproc:
        raise ConfigError(
            f"--nproc: got {nproc} in a job of {place.world} ranks; accepted: no --nproc here"
        )
    world = place.world if place else 1 if nproc is None else nproc
    warnings = check_run(config, world)
    check_kernels(config, transformer_phases(config, world))
    check_trackers(config)
    # of the processes of a job one looks for the tasks; local workers come after it has
    check_eval_tasks(config, looks_up=place is None or place.rank == 0)
    position, finished = look(config)
    if finished:
        _say_finished(config, place)
        return 0
    if place is None:  # in a job rank 0 finds out, with its lock
        check_free(config)
    if position is None:
        warnings += unknown_tokenizer(config)
    check_writable("run.dir", config.folder)
    try:
        leader = Leader(place)
        if leader.is_me:
            for warning in warnings if position is None else ():
                print(f"warning: {warning}", file=sys.stderr, flush=True)
            prepare_imports()
            if place is not None and place.world > 1 and position is None:
                _say_unprepared(config, place.world, arguments)
        values, changes = leader.does(lambda: _settled(config, position), "prepares the corpus")
    except (LeaderFailed, TimeoutError) as error:
        _last_line(f"rank {place.rank if place else 0}: {error}")
        return 1
    trained_on = data.DataIdentity.from_values(values)
    assert trained_on is not None, values
    data.wait_until_seen(trained_on)
    if place is None and (world > 1 or apart):
        return run_workers([sys.executable, "-m", "megatron_progressive", *arguments], world)
    return _rank(config, place or Place(0, 0, 1), leader, warnings, changes, trained_on)


def _say_unprepared(config: RunConfig, world: int, arguments: list[str]) -> None:
    """Say what the ranks wait for, where that has yet to be prepared, and how not to wait."""
    unprepared = False
    with contextlib.suppress(ConfigError):  # settling says it, to all ranks
        unprepared = data.is_unprepared(config)
    if unprepared:
        words = " ".join(["mprog data prepare", *arguments[1:]])
        print(
            f"data: {config.data.corpus} is not prepared yet: rank 0 prepares it while {world - 1} "
            f"of the job wait (`{words}` does that before a job, with --workers N or, on many "
            "nodes, launch/prepare.sh)",
            file=sys.stderr,
            flush=True,
        )


def _say_finished(config: RunConfig, place: Place | None) -> None:
    """Say that there is nothing to do, and also where the corpus is not the one that the finished
    run was trained on."""
    if place is not None and place.rank != 0:
        return
    print(f"{config.run.name}: finished before, nothing to do", file=sys.stderr)
    known = data.read_identity(config.folder / data.DATA_FILE)
    if data.changed_since(config, known):
        print(
            f"{config.run.name}: data.corpus {config.data.corpus} has changed since; a new "
            "run.name would train on it",
            file=sys.stderr,
        )


def _settled(config: RunConfig, position: TrainingPosition | None) -> list[Any]:
    """What the run is trained on, as JSON can hold it, and what the user should be told about
    that."""
    begun = None
    if position is None:
        check_tokenizer(config)
    else:
        newest = checkpoint_path(config.folder, position.step)
        known, at = read_description(newest)[1].data, newest.stat().st_mtime
        begun = data.Begun(str(config.folder), "a new run.name", known, at)
    found, notes = data.settle(config, begun)
    return [found.to_values(), notes]


def _rank(
    config: RunConfig,
    place: Place,
    leader: Leader,
    warnings: list[str],
    changes: list[str],
    trained_on: data.DataIdentity,
) -> int:
    """Run one rank of the job.

    Args:
        warnings: what is said first of a fresh run.
        changes: what is said first of a run that goes on.
    """
    import torch

    if not torch.cuda.is_available() and "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        if config.kernels.deterministic:
            deterministic_kernels()
        with evaluations(config, active=place.rank == 0) as tasks:
            with world_group(place, leader.store):
                from megatron_progressive.train.loop import DONE, train

                try:
                    with sole_job(config) as start:
                        if start.finished:
                            _say_finished(config, place)
                            return 0
                        notes = warnings if start.position is None else changes
                        code = train(config, start.position, notes, trained_on, start.lock, tasks)
                except (ConfigError, DamagedCheckpoint):
                    raise
                except Exception as error:
                    # before the group is left, which may take long and end with another error
                    _say_cause(place.rank, error)
                    raise _Said from error
            if code == DONE:  # the other ranks need not wait, nor does their hardware
                _wait_for(tasks, config)
            return code
    except DamagedCheckpoint:
        if place.rank:
            return 2  # all ranks have found it: one says so
        raise
    except ConfigError:
        raise
    except _Said:
        pass
    except Exception as error:
        _say_cause(place.rank, error)
    return 1


def _wait_for(tasks: Evaluations, config: RunConfig) -> None:
    tasks.say = lambda step, line: _last_line(f"{config.run.name}: {line}")
    tasks.record = lambda step, scores: record_late(config, "tasks", {"step": step, **scores})
    tasks.wait()


class _Said(Exception):
    """A rank has failed, and has said why."""


def _say_cause(rank: int, error: Exception) -> None:
    from megatron_progressive.runtime.agreement import RankFailed, cause_line

    if not isinstance(error, (RankFailed, WriteFailed)):  # nothing to look for in this program
        traceback.print_exception(error)
    _last_line(cause_line(rank, error))


def _last_line(line: str) -> None:
    """Print the last line, which names the rank and the cause."""
    with outlives_its_reader():
        print(line, file=sys.stderr, flush=True)
