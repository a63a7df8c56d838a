"""One job in a run folder: who may begin to train in it, and from where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch.distributed as dist

from megatron_progressive.checkpoints.checkpoint import TrainingPosition
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.runs.folder import look
from megatron_progressive.runtime.files import WriteFailed, writing
from megatron_progressive.runtime.folder_lock import (
    LOCK_NAME,
    STALE_SECONDS,
    FolderInUse,
    FolderLock,
    Owner,
    owner_of,
)


@dataclass(frozen=True)
class Start:
    """What rank 0 found in the run folder once the folder was this job's."""

    position: TrainingPosition | None = None
    """The position from which to resume; None for a fresh start."""
    finished: bool = False
    """Whether another job has finished the run meanwhile."""
    refusal: str = ""
    """Why this job cannot begin."""
    failure: str = ""
    """What the disk said, where the disk is the reason."""
    lock: FolderLock | None = None
    """The lock of the folder, on rank 0."""


def check_free(config: RunConfig) -> None:
    """Check that no job trains in the run folder, by a mere look at it.

    Raises:
        ConfigError: a job trains in it.
    """
    owner = owner_of(config.folder / LOCK_NAME)
    if owner is not None:
        raise ConfigError(_in_use(config, owner))


def _in_use(config: RunConfig, owner: Owner) -> str:
    return (
        f"run.name: {config.folder} is in use by another job, {owner}; accepted: another run.name, "
        f"or this one when that job has ended (one that crashed on another host counts as ended "
        f"after {STALE_SECONDS:g} s)"
    )


@contextmanager
def sole_job(config: RunConfig) -> Iterator[Start]:
    """A context in which the run folder belongs to this job alone. Collective over all ranks: rank
    0 has the lock, and reads the folder once nobody else can write to it.

    Raises:
        ConfigError: on rank 0, where another job has the folder or has changed it, or where it
            cannot be written. The other ranks end without a word, with the same exit code.
        WriteFailed: on rank 0, where the disk is full or fails; the other ranks end likewise.
    """
    first = dist.get_rank() == 0
    lock = FolderLock(config.folder / LOCK_NAME)
    try:
        start = _begin(config, lock) if first else Start()
        if dist.get_world_size() > 1:
            told = [start]
            dist.broadcast_object_list(told, src=0)
            start = told[0]
        if start.refusal and first:
            raise ConfigError(start.refusal)
        if start.failure and first:
            raise WriteFailed(start.failure)
        if start.refusal or start.failure:
            raise SystemExit(2 if start.refusal else 1)
        yield replace(start, lock=lock if first else None)
    finally:
        had = lock.held
        lock.release()
        if had:
            with suppress(OSError):  # of a run that could not begin: empty
                config.folder.rmdir()


def _begin(config: RunConfig, lock: FolderLock) -> Start:
    try:
        with writing(f"making {config.folder}"):
            lock.acquire()
        return Start(*look(config))
    except WriteFailed as error:
        return Start(failure=str(error))
    except FolderInUse as error:
        return Start(refusal=_in_use(config, error.owner))
    except ConfigError as error:
        return Start(refusal=str(error))
    except OSError as error:
        return Start(
            refusal=f"run.dir: {config.folder} cannot be written: {error.strerror}; accepted: a "
            f"folder that can"
        )
