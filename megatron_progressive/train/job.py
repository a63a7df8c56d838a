"""``mprog train``: check everything, then join the job or start local workers."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from megatron_progressive import data
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.engines.kernels import check_kernels
from megatron_progressive.runtime.distributed import (
    Place,
    place_from_environment,
    prepare_imports,
    world_group,
)
from megatron_progressive.runtime.launch import run_workers
from megatron_progressive.runtime.leader import Leader, LeaderFailed
from megatron_progressive.state.checkpoint import Progress, checkpoints, read_description
from megatron_progressive.state.initial import check_tokenizer, unknown_tokenizer
from megatron_progressive.study.preflight import check_run
from megatron_progressive.train.run_folder import check_folder, is_finished
from megatron_progressive.train.trackers import check_trackers


def run_job(config: RunConfig, nproc: int | None, arguments: list[str], apart: bool = False) -> int:
    """Train; returns the exit code.

    Under torchrun or Slurm this process is one rank of the job. Otherwise ``nproc`` local
    workers are started with ``arguments`` (those of ``mprog``), or, for one, none (with ``apart``
    also for one: several runs in a row then share no process).

    Raises:
        ConfigError: before any process group or file is created.
    """
    place = place_from_environment()
    if place is not None and nproc is not None and place.world != nproc:
        raise ConfigError(
            f"--nproc: got {nproc} in a job of {place.world} ranks; accepted: no --nproc here"
        )
    world = place.world if place else nproc or 1
    if world < 1:
        raise ConfigError(f"--nproc: got {nproc}; accepted: from 1")
    warnings = check_run(config, world)
    check_kernels(config)
    check_trackers(config)
    progress = check_folder(config)
    if is_finished(config):
        if place is None or place.rank == 0:
            print(f"{config.run.name}: finished before, nothing to do", file=sys.stderr)
            _say_what_changed(config)
        return 0
    if progress is not None and progress.step > config.last_step:
        raise ConfigError(
            f"train.stop_after: got {config.train.stop_after}; accepted: from "
            f"{progress.step}, where {config.folder} is"
        )
    if progress is None:
        warnings += unknown_tokenizer(config)
    leader = Leader(place)
    if leader.is_me:
        for warning in warnings if progress is None else ():
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        prepare_imports()
    try:
        values, changes = leader.does(lambda: _settled(config, progress), "prepares the corpus")
    except LeaderFailed as error:
        print(f"rank {place.rank if place else 0}: {error}", file=sys.stderr, flush=True)
        return 1
    trained_on = data.DataIdentity.from_values(values)
    assert trained_on is not None, values
    data.wait_until_seen(trained_on)
    if place is None and (world > 1 or apart):
        return run_workers([sys.executable, "-m", "megatron_progressive", *arguments], world)
    notes = warnings if progress is None else changes
    return _rank(config, place or Place(0, 0, 1), progress, notes, trained_on)


def _say_what_changed(config: RunConfig) -> None:
    """Of a finished run, which will not be trained on what its corpus has become."""
    known = data.read_identity(config.folder / data.DATA_FILE)
    if data.changed_since(config, known):
        print(
            f"{config.run.name}: data.corpus {config.data.corpus} has changed since; a new "
            "run.name would train on it",
            file=sys.stderr,
        )


def _settled(config: RunConfig, progress: Progress | None) -> list[Any]:
    """What the run is trained on, as JSON can hold it, and what is to be said of that."""
    begun = None
    if progress is None:
        check_tokenizer(config)
    else:
        newest = checkpoints(config.folder)[-1]
        known, at = read_description(newest)[1].data, newest.stat().st_mtime
        begun = data.Begun(str(config.folder), "a new run.name", known, at)
    found, notes = data.settle(config, begun)
    return [found.to_values(), notes]


def _rank(
    config: RunConfig,
    place: Place,
    progress: Progress | None,
    notes: list[str],
    trained_on: data.DataIdentity,
) -> int:
    import torch

    if not torch.cuda.is_available() and "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        with world_group(place):
            from megatron_progressive.train.loop import train

            # The folder was read before joining, when no rank could have begun to write it.
            return train(config, progress, notes, trained_on)
    except ConfigError:
        raise
    except Exception as error:  # the last line names the rank and the cause
        traceback.print_exc()
        cause = " ".join(str(error).split()) or "no message"
        print(f"rank {place.rank}: {type(error).__name__}: {cause}", file=sys.stderr, flush=True)
        return 1
