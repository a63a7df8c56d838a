"""Checkpoints: boxes of global tensors through Megatron-core's distributed checkpoint.

Each slot of each global tensor is one entry, ``name/slot``, in the ``torch_dist`` format. It is
saved as the boxes that ranks hold and read back as the boxes that they will hold, so that loading
on another layout is the same operation. ``progress.json`` is written last and lists size and
checksum of every file, so that a checkpoint without it, or whose files disagree, is not one
(:mod:`.contents`); it also describes the model (:class:`.record.ModelRecord`). Reading that file
needs no torch.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_progressive.checkpoints.contents import (
    PROGRESS_FILE,
    DamagedCheckpoint,
    SavedFile,
    content_damage,
    listed,
    read_listed,
    sha256_of,
    size_damage,
    with_own_checksum,
)
from megatron_progressive.checkpoints.index import stored_tensors
from megatron_progressive.checkpoints.record import ModelRecord
from megatron_progressive.checkpoints.tokenizer_files import FOLDER as TOKENIZER_FOLDER
from megatron_progressive.checkpoints.tokenizer_files import copy_tokenizer
from megatron_progressive.config import CONFIG_FILE, ConfigError
from megatron_progressive.reshard.boxes import MASTER, PARAM, WEIGHT_SLOTS, Piece, ShardedState
from megatron_progressive.runtime.files import fsync_path, write_json, writing

_NAME = re.compile(r"step_(\d{7,})")


@dataclass(frozen=True)
class TrainingPosition:
    """How far a run has come: what a checkpoint keeps of it beside the model."""

    step: int
    """Number of steps done."""
    expansions: int
    """Number of expansions done."""
    num_layers: int
    samples: int
    """Number of training samples consumed, which is the position in the order of samples."""
    flops: float
    """Cumulative training FLOPs."""
    train_wall_s: float
    """Seconds spent in training steps."""
    wall_s: float
    """Seconds since the start of the run, including evaluations, saves and expansions."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of a checkpoint in a run folder, as ``checkpoints/step_0001200``."""
    return folder / "checkpoints" / f"step_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of one of the :func:`checkpoints`."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run folder, oldest first."""
    found = [
        (int(match.group(1)), path)
        for path in (folder / "checkpoints").glob("step_*")
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint that a path stands for. For a run folder, or its folder of checkpoints, it is
    the newest one, and standard error says which; any other path is left to the reader.

    Raises:
        ConfigError: the path is a run folder without checkpoints, or a folder of several runs.
    """
    if (path / PROGRESS_FILE).exists() or not path.is_dir():
        return path
    run = path.parent if path.name == checkpoint_path(path, 0).parent.name else path
    if (run / CONFIG_FILE).is_file():
        found = checkpoints(run)
        if not found:
            raise ConfigError(
                f"checkpoint: {run} is a run folder without a checkpoint; accepted: one that has "
                "saved"
            )
        if all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID")):
            said = f"{path} is a run folder; its newest checkpoint is {found[-1]}"
            print(said, file=sys.stderr, flush=True)
        return found[-1]
    for runs in (path, path / "cells"):  # of a study
        if any((folder / CONFIG_FILE).is_file() for folder in runs.glob("*/")):
            raise ConfigError(
                f"checkpoint: {path} is a folder of runs; accepted: one of them, or one of its "
                "checkpoints"
            )
    return path


def read_position(checkpoint: Path) -> TrainingPosition:
    """The position that a checkpoint holds, after checking that all its files are there.

    Raises:
        ConfigError: as :func:`read_description`.
    """
    return read_description(checkpoint)[0]


def read_description(checkpoint: Path) -> tuple[TrainingPosition, ModelRecord]:
    """The position and the model in a checkpoint, once the sizes of its files have been checked.

    Raises:
        ConfigError: there is no such folder.
        DamagedCheckpoint: a file is missing or has another size.
    """
    return _described(checkpoint)[:2]


def read_whole(checkpoint: Path) -> tuple[TrainingPosition, ModelRecord]:
    """The same as :func:`read_description`, once all files have been read and found to have the
    content that was saved."""
    position, model, files = _described(checkpoint)
    if damage := content_damage(checkpoint, files):
        raise DamagedCheckpoint(checkpoint, damage)
    return position, model


def _described(checkpoint: Path) -> tuple[TrainingPosition, ModelRecord, dict[str, SavedFile]]:
    if not checkpoint.is_dir():
        raise ConfigError(
            f"checkpoint: no folder {checkpoint}; accepted: a checkpoint, as "
            "RUN/checkpoints/step_0001200"
        )
    values, files = read_listed(checkpoint)
    try:
        model = ModelRecord.from_values(values.pop("model"))
        position = TrainingPosition(**values)
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(
            checkpoint, f"{PROGRESS_FILE} does not describe a checkpoint of this version"
        ) from None
    if damage := size_damage(checkpoint, files):
        raise DamagedCheckpoint(checkpoint, damage)
    return position, model, files


def files_of(checkpoint: Path) -> dict[str, SavedFile]:
    """The files of a checkpoint by name, once their sizes have been checked; raises what
    :func:`read_description` raises."""
    return _described(checkpoint)[2]


def seal(
    folder: Path,
    position: TrainingPosition,
    model: ModelRecord,
    sha256: Mapping[str, str] | None = None,
) -> None:
    """Make the files in ``folder`` a checkpoint: flush them to disk, then describe them.

    Args:
        sha256: the hashes of files for which they are known.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in paths:
        fsync_path(path)
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    hashes = dict(sha256 or {})
    hashes |= sha256_of(folder, [name for name in names if name not in hashes])
    files = {name: SavedFile(path.stat().st_size, hashes[name]) for name, path in names.items()}
    values = {**asdict(position), "model": model.to_values(), **listed(files)}
    write_json(folder / PROGRESS_FILE, with_own_checksum(values))


def _sharded_tensors(state: ShardedState) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import ShardedTensor

    return {
        str(index): ShardedTensor(
            key=f"{piece.name}/{piece.slot}",
            data=piece.data,
            dtype=piece.data.dtype,
            local_shape=piece.box.shape,
            global_shape=piece.global_shape,
            global_offset=piece.box.offset,
            axis_fragmentations=None,  # boxes need not lie on a regular grid
            replica_id=(int(piece.tied_copy), piece.replica),
        )
        for index, piece in enumerate(state.pieces)
    }


def save(
    state: ShardedState,
    folder: Path,
    position: TrainingPosition,
    model: ModelRecord,
    keep: int,
    protected: Collection[int] = (),
    tokenizer: Path | None = None,
) -> Path:
    """Write a checkpoint into a run folder. Collective over all ranks.

    The files go to a hidden folder that is renamed when everything is on disk, so an interrupted
    save leaves the previous checkpoint untouched; a save that fails is removed. The newest ``keep``
    checkpoints stay (0: all of them), and those of the ``protected`` steps. ``tokenizer`` is the
    folder of the model's tokenizer, which is copied into the checkpoint.

    Raises:
        WriteFailed: the disk is full or fails.
        RankFailed: the save failed on another rank.
    """
    import torch.distributed as dist

    from megatron_progressive.runtime.agreement import all_succeed

    final = checkpoint_path(folder, position.step)
    temporary = final.with_name(f".{final.name}.tmp")
    first = dist.get_rank() == 0
    what = f"saving step {position.step} to {final}"
    try:
        with all_succeed(what), writing(what):
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            dist.barrier()
            hashes = _write(state, temporary)
            if first:
                if tokenizer is not None:
                    copy_tokenizer(tokenizer, temporary / TOKENIZER_FOLDER)
                seal(temporary, position, model, hashes)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temporary, final)
                fsync_path(final.parent)
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if first:
        kept = {checkpoint_path(folder, step) for step in protected}
        for old in checkpoints(folder)[:-keep] if keep else ():
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def _write(state: ShardedState, folder: Path) -> dict[str, str]:
    """Write the pieces of all ranks; returns the hashes of their files, each from the rank that
    wrote the file. Collective over all ranks."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_progressive.runtime.agreement import FailedElsewhere

    # Saves are synchronous, in this process: a plain queue does for the results. By default
    # Megatron-core starts a manager process on every rank (seconds) that outlives the save.
    filesystem_async._results_queue = queue.SimpleQueue()
    rank, world = dist.get_rank(), dist.get_world_size()
    failed: Exception | None = None
    with _errors_of(filesystem_async) as errors:
        try:
            # Whole coverage is the engine's own invariant (tested); Megatron's check of it
            # gathers every shard's metadata on rank 0.
            dist_checkpointing.save(
                _sharded_tensors(state), str(folder), validate_access_integrity=False
            )
        except CheckpointException as error:  # no Exception, and on every rank
            if errors:
                failed = errors[0]
            elif rank in error.failures:
                failed = RuntimeError(_root(error.failures[rank][0]))
            else:
                failed = FailedElsewhere("a save that another rank could not finish")
    if failed is not None:
        raise failed  # here, where it keeps its own context
    own = [path.name for path in folder.glob(f"__{rank}_*.distcp")]
    hashes: list[dict[str, str]] = [{}] * world
    dist.all_gather_object(hashes, sha256_of(folder, own))
    return {name: value for of_rank in hashes for name, value in of_rank.items()}


@contextmanager
def _errors_of(writer: Any) -> Iterator[list[Exception]]:
    """Collect what fails in the threads of Megatron-core's writer, which logs the text and drops
    the error (0.19.2: dist_checkpointing/strategies/filesystem_async.py)."""
    errors: list[Exception] = []
    owner, write = writer.FileSystemWriterAsync, writer.FileSystemWriterAsync.write_preloaded_data

    @functools.wraps(write)
    def noting(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        if isinstance(result[1], Exception):
            errors.append(result[1])
        return result

    logger = logging.getLogger(writer.__name__)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    owner.write_preloaded_data = staticmethod(noting)
    try:
        yield errors
    finally:
        owner.write_preloaded_data = staticmethod(write)
        logger.setLevel(level)


def _root(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def load(state: ShardedState, checkpoint: Path) -> None:
    """Fill every piece from a checkpoint of any layout. Collective over all ranks.

    Raises:
        KeyError: the checkpoint lacks a tensor, or holds it in another shape.
        RuntimeError: a file cannot be read; the message says why.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    wanted = _sharded_tensors(state)
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    for tensor in wanted.values():
        found = stored.get(tensor.key)
        if found is None or tuple(found.global_shape) != tuple(tensor.global_shape):
            shape = "nothing" if found is None else tuple(found.global_shape)
            raise KeyError(f"{checkpoint}: {tensor.key} is {shape}, not {tensor.global_shape}")
    try:
        loaded = dist_checkpointing.load(wanted, str(checkpoint), validate_access_integrity=False)
    except CheckpointException as error:  # no Exception
        roots = [_root(failure) for failure, _ in error.failures.values()] or ["on another rank"]
        raise RuntimeError(f"{roots[0]} while loading {checkpoint}") from None
    for index, piece in enumerate(state.pieces):
        if loaded[str(index)].data_ptr() != piece.data.data_ptr():
            piece.data.copy_(loaded[str(index)])


def load_weights(state: ShardedState, checkpoint: Path) -> None:
    """Fill the weights from a checkpoint of any layout and precision; optimizer state stays as it
    is. Collective over all ranks.

    A weight in fp32 (a master weight, or any weight of a run in fp32) takes the master weight where
    there is one; any other weight is rounded to the run's type.

    Raises:
        KeyError: the checkpoint lacks a tensor, or holds it in another shape.
    """
    import torch

    stored = stored_tensors(checkpoint)

    def source(piece: Piece) -> Piece:
        """The piece with the slot to read, in memory of the type of that slot."""
        slots = stored.get(piece.name, {})
        exact = piece.data.dtype == torch.float32 and MASTER in slots
        slot = MASTER if exact else PARAM
        dtype = getattr(torch, slots[slot].dtype) if slot in slots else piece.data.dtype
        data = (
            piece.data if dtype == piece.data.dtype else torch.empty_like(piece.data, dtype=dtype)
        )
        return replace(piece, slot=slot, data=data)

    for slot in WEIGHT_SLOTS:  # one after the other: both may come from the same stored tensor
        pieces = [piece for piece in state.pieces if piece.slot == slot]
        sources = [source(piece) for piece in pieces]
        load(ShardedState(sources), checkpoint)
        for piece, read in zip(pieces, sources, strict=True):
            if read.data is not piece.data:
                piece.data.copy_(read.data)
