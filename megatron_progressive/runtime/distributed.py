"""Joining the job: ranks from torchrun or Slurm, the device, the world process group."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from megatron_progressive.config import ConfigError

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Place:
    """This process among the job's."""

    rank: int
    local_rank: int
    world: int


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Rank and world as torchrun or Slurm set them; None outside a job.

    Raises:
        ConfigError: some of the variables are set and others not, or not numbers.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    elif "RANK" not in environment:
        return None
    try:
        return Place(*(int(environment[name]) for name in names))
    except (KeyError, ValueError):
        got = ", ".join(f"{name}={environment.get(name)}" for name in names)
        raise ConfigError(f"environment: got {got}; accepted: all three, as numbers") from None


def prepare_imports() -> None:
    """Call before anything imports Megatron-core.

    Leaves out notes of Megatron-core and torch that no user of this program can act on
    (deprecations of names they call themselves, missing optional accelerators); errors stay.
    Without CUDA it turns off the compiler, which would start for tens of seconds on a CPU, and
    asks for huge pages.
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


@contextmanager
def world_group(place: Place) -> Iterator[None]:
    """The world process group (NCCL with CUDA, gloo without), destroyed at the end.

    Alone (``world`` 1, outside a job) it needs no address.
    """
    prepare_imports()
    import torch
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    from megatron_progressive.runtime import cpu

    cpu.install()
    # What imports have made stays: collections at an expansion need not look through it.
    gc.freeze()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    alone = place.world == 1 and "MASTER_ADDR" not in os.environ
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        rank=place.rank,
        world_size=place.world,
        timeout=TIMEOUT,
        store=HashStore() if alone else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
