"""``mprog train``: check everything, then join the job or start local workers."""

from __future__ import annotations

import os
import sys
import traceback

from megatron_progressive import data
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.engines.kernels import check_kernels
from megatron_progressive.runtime.distributed import (
    Place,
    place_from_environment,
    prepare_imports,
    world_group,
)
from megatron_progressive.runtime.files import WriteFailed
from megatron_progressive.runtime.launch import run_workers
from megatron_progressive.runtime.signals import outlives_its_reader
from megatron_progressive.state.checkpoint import Progress
from megatron_progressive.state.contents import DamagedCheckpoint
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
        return 0
    if progress is not None and progress.step > config.last_step:
        raise ConfigError(
            f"train.stop_after: got {config.train.stop_after}; accepted: from "
            f"{progress.step}, where {config.folder} is"
        )
    data.check(config)
    if place is None or place.rank == 0:
        for warning in warnings if progress is None else ():
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        prepare_imports()
        data.prepare(config)
    if place is None and (world > 1 or apart):
        return run_workers([sys.executable, "-m", "megatron_progressive", *arguments], world)
    return _rank(config, place or Place(0, 0, 1), progress, warnings)


def _rank(config: RunConfig, place: Place, progress: Progress | None, warnings: list[str]) -> int:
    import torch

    from megatron_progressive.runtime.agreement import RankFailed, cause_line

    if not torch.cuda.is_available() and "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        with world_group(place):
            from megatron_progressive.train.loop import train

            # The folder was read before joining, when no rank could have begun to write it.
            return train(config, progress, warnings)
    except DamagedCheckpoint:
        if place.rank:
            return 2  # all ranks have found it: one says so
        raise
    except ConfigError:
        raise
    except (RankFailed, WriteFailed) as error:  # nothing to look for in this program
        _last_line(cause_line(place.rank, error))
    except Exception as error:
        traceback.print_exc()
        _last_line(cause_line(place.rank, error))
    return 1


def _last_line(line: str) -> None:
    """Names the rank and the cause."""
    with outlives_its_reader():
        print(line, file=sys.stderr, flush=True)
