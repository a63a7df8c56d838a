"""The checkpoint from which a run goes on, which is the newest whole one. Damaged ones stay, under
a name that says so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_progressive.checkpoints.checkpoint import (
    TrainingPosition,
    checkpoints,
    files_of,
    read_position,
    step_of,
)
from megatron_progressive.checkpoints.contents import DamagedCheckpoint, content_damage

ASIDE = ".damaged"
"""The suffix of a damaged checkpoint, at which neither resuming nor clearing up looks."""


def newest_described(folder: Path) -> TrainingPosition | None:
    """The position of the newest checkpoint of a run folder whose files have the sizes that were
    saved; None where there is no checkpoint.

    Raises:
        DamagedCheckpoint: there are checkpoints, and none of them is whole.
    """
    found, _ = _newest(checkpoints(folder), _size_damage)
    return None if found is None else read_position(found)


def newest_whole(folder: Path, last: int) -> tuple[TrainingPosition | None, dict[Path, str]]:
    """The position of the newest checkpoint up to step ``last`` whose files have the content that
    was saved, and what is damaged in each newer one. The position is None where there is no
    checkpoint. Collective over all ranks, each of which reads a part of the files.

    Raises:
        DamagedCheckpoint: on every rank, where there are checkpoints and none of them is whole.
    """
    import torch.distributed as dist

    saved = [checkpoints(folder)]
    dist.broadcast_object_list(saved)
    later = {path: _size_damage(path) for path in reversed(saved[0]) if step_of(path) > last}
    found, damaged = _newest([path for path in saved[0] if step_of(path) <= last], _damage)
    damaged = {path: damage for path, damage in later.items() if damage} | damaged
    return (None if found is None else read_position(found)), damaged


def check_whole(checkpoint: Path) -> None:
    """Read all files of a checkpoint once, shared out among the ranks. Collective over all ranks.

    Raises:
        DamagedCheckpoint: on every rank, where a file does not have the content that was saved.
    """
    if damage := _damage(checkpoint):
        raise DamagedCheckpoint(checkpoint, damage)


def set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name that is no checkpoint's; returns its new path."""
    number, name = 1, f"{checkpoint.name}{ASIDE}"
    while (aside := checkpoint.with_name(name)).exists():
        number += 1
        name = f"{checkpoint.name}{ASIDE}.{number}"
    with suppress(FileNotFoundError):  # moved meanwhile, with all that came after a step
        checkpoint.rename(aside)
    return aside


def _size_damage(checkpoint: Path) -> str | None:
    try:
        read_position(checkpoint)
    except DamagedCheckpoint as error:
        return error.damage
    return None


def _newest(
    saved: list[Path], damage_of: Callable[[Path], str | None]
) -> tuple[Path | None, dict[Path, str]]:
    damaged: dict[Path, str] = {}
    for path in reversed(saved):
        damage = damage_of(path)
        if damage is None:
            return path, damaged
        damaged[path] = damage
    if damaged:
        newest, damage = next(iter(damaged.items()))
        raise DamagedCheckpoint(newest, f"{damage}, and no whole one is before it")
    return None, damaged


def _damage(checkpoint: Path) -> str | None:
    """The damage of a checkpoint, the same on every rank. Collective over all ranks."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    damage: str | None
    try:
        files = files_of(checkpoint)
        by_size = sorted(files, key=lambda name: (-files[name].size, name))
        damage = content_damage(checkpoint, files, by_size[rank::world])
    except DamagedCheckpoint as error:
        damage = error.damage
    found: list[str | None] = [None] * world
    dist.all_gather_object(found, damage)
    return next((one for one in found if one is not None), None)
