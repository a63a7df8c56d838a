"""Joining a job: ranks from torchrun or Slurm, the device, and the world process group."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_progressive.config import ConfigError
from megatron_progressive.runtime.numerics import exact_products
from megatron_progressive.runtime.rendezvous import TIMEOUT, meet
from megatron_progressive.runtime.tied import end_with_starter

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers its own steps (batch scripts, interactive shells) from here on."""


@dataclass(frozen=True)
class Place:
    """The place of this process among those of the job."""

    rank: int
    local_rank: int
    world: int


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The rank and the world size that torchrun or Slurm have set; None outside of a job.

    Raises:
        ConfigError: some of the variables are missing, are not numbers, or do not belong to one
            job; or this is a Slurm job of several tasks and ``srun`` has not started this process.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if "RANK" not in environment:
        if _number(environment, "SLURM_NTASKS", 1) == 1:
            return None
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
        # a batch script and a shell of salloc may have the first task's number all the same
        step = _number(environment, "SLURM_STEP_ID", _FIRST_SPECIAL_STEP)
        if step >= _FIRST_SPECIAL_STEP or "SLURM_PROCID" not in environment:
            raise ConfigError(
                f"environment: got SLURM_NTASKS={environment['SLURM_NTASKS']} without srun, which "
                "starts the tasks: this process would wait for them for ever; accepted: `srun "
                "mprog …`, one of launch/*.sh, or without SLURM_NTASKS (`env -u SLURM_NTASKS mprog "
                "…`) for ranks of this host alone"
            )
    place = Place(*(_number(environment, name) for name in names))
    if not (0 <= place.rank < place.world and 0 <= place.local_rank < place.world):
        got = ", ".join(f"{name}={environment[name]}" for name in names)
        raise ConfigError(f"environment: got {got}; accepted: ranks from 0, below {names[2]}")
    if place.world > 1 or "MASTER_ADDR" in environment:
        if not environment.get("MASTER_ADDR"):
            raise ConfigError(
                "environment: got no MASTER_ADDR; accepted: the name or address of rank 0's host, "
                "as launch/*.sh and torchrun set it"
            )
        if not 0 < _number(environment, "MASTER_PORT") < 1 << 16:
            raise ConfigError(
                f"environment: got MASTER_PORT={environment['MASTER_PORT']}; accepted: from 1 to "
                f"{(1 << 16) - 1}"
            )
    return place


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    got = environment.get(name)
    if got is None and default is not None:
        return default
    try:
        return int(got or "")
    except ValueError:
        raise ConfigError(f"environment: got {name}={got}; accepted: a number") from None


def prepare_imports() -> None:
    """Prepare this process for importing Megatron-core; to be called before anything imports it.

    Notes of Megatron-core and torch on which no user of this program can act are silenced
    (deprecated names that they call themselves, optional accelerators that are missing); errors
    stay. Without CUDA the compiler is turned off, which would take tens of seconds to start on a
    CPU, and huge pages are asked for.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # Huge pages: fresh memory, which is what an expansion is made of, costs a quarter.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    # how Megatron-core calls it
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings(
            "ignore", category=category, module=r"torch\.distributed\.checkpoint"
        )


@contextmanager
def world_group(place: Place, store: Any = None) -> Iterator[None]:
    """The world process group (NCCL with CUDA, gloo without), which is destroyed at the end.

    A process alone (``world`` 1, outside of a job) needs no address.

    Args:
        store: the store in which all ranks have already met (:func:`.rendezvous.meet`); None lets
            them meet now.

    Raises:
        TimeoutError: not all ranks came in time.
    """
    end_with_starter()
    prepare_imports()
    import torch
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import _abort_process_group

    from megatron_progressive.runtime import cpu

    cpu.install()
    exact_products()
    # What imports have made stays: collections at an expansion need not look through it.
    gc.freeze()
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    alone = place.world == 1 and "MASTER_ADDR" not in os.environ
    if store is None:
        store = HashStore() if alone else meet(place.rank, place.local_rank, place.world)
    dist.init_process_group(
        "gloo" if device is None else "nccl",
        rank=place.rank,
        world_size=place.world,
        timeout=TIMEOUT,
        store=store,
        device_id=device,  # the world's communicator is made now, not in the midst of a step
    )
    try:
        yield
    except BaseException:
        # NCCL's destroy may wait for ranks that never come: they wait for this one
        (dist.destroy_process_group if device is None else _abort_process_group)()
        raise
    dist.destroy_process_group()
