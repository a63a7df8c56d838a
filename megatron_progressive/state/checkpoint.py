"""Checkpoints: boxes of global tensors through Megatron-core's distributed checkpoint.

Each slot of each global tensor is one entry, ``name/slot``, of ``torch_dist`` format, saved
as the boxes that ranks hold and read back as the boxes that they will hold: loading on
another layout is the same operation. ``progress.json`` is written last and lists the size of
every file, so that a checkpoint without it, or whose files disagree, is not one; it also
describes the model (:class:`.record.ModelRecord`). Reading it needs no torch.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError
from megatron_progressive.runtime.files import fsync_path, write_json
from megatron_progressive.state.boxes import MASTER, PARAM, WEIGHT_SLOTS, Piece, ShardedState
from megatron_progressive.state.record import ModelRecord
from megatron_progressive.state.stored import stored_tensors
from megatron_progressive.state.tokenizer_files import FOLDER as TOKENIZER_FOLDER
from megatron_progressive.state.tokenizer_files import copy_tokenizer

PROGRESS_FILE = "progress.json"
_NAME = re.compile(r"step_(\d{7,})")


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Steps done."""
    expansions: int
    """Expansions done."""
    num_layers: int
    samples: int
    """Training samples consumed: the position in the order of samples."""
    flops: float
    """Cumulative training FLOPs."""
    train_wall_s: float
    """Seconds spent in training steps."""
    wall_s: float
    """Seconds since the start of the run, evaluations, saves and expansions included."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """``checkpoints/step_0001200``."""
    return folder / "checkpoints" / f"step_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of one of :func:`checkpoints`."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run folder, oldest first."""
    found = [
        (int(match.group(1)), path)
        for path in (folder / "checkpoints").glob("step_*")
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def read_progress(checkpoint: Path) -> Progress:
    """The progress that a checkpoint holds, after checking that all its files are whole.

    Raises:
        ConfigError: a file is missing or truncated.
    """
    return read_description(checkpoint)[0]


def read_description(checkpoint: Path) -> tuple[Progress, ModelRecord]:
    """Progress and model of a checkpoint, after checking that all its files are whole.

    Raises:
        ConfigError: no such folder, or a file is missing or truncated.
    """
    if not checkpoint.is_dir():
        raise ConfigError(
            f"checkpoint: no folder {checkpoint}; accepted: a checkpoint, as "
            "RUN/checkpoints/step_0001200"
        )
    try:
        values: dict[str, Any] = json.loads((checkpoint / PROGRESS_FILE).read_text())
        sizes = values.pop("files")
        model = ModelRecord.from_values(values.pop("model"))
        progress = Progress(**values)
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"checkpoint: {checkpoint} has no readable {PROGRESS_FILE}; accepted: a whole "
            "checkpoint (remove this one to resume from the one before)"
        ) from None
    for name, size in sizes.items():
        path = checkpoint / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            got = "missing" if actual is None else f"truncated to {actual} of {size} bytes"
            raise ConfigError(
                f"checkpoint: {path} is {got}; accepted: a whole checkpoint (remove "
                f"{checkpoint.name} to resume from the one before)"
            )
    return progress, model


def seal(folder: Path, progress: Progress, model: ModelRecord) -> None:
    """Make the files in ``folder`` a checkpoint: flush them to disk, then describe them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        fsync_path(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    values = {**asdict(progress), "model": model.to_values(), "files": sizes}
    write_json(folder / PROGRESS_FILE, values)


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
    progress: Progress,
    model: ModelRecord,
    keep: int,
    protected: Collection[int] = (),
    tokenizer: Path | None = None,
) -> Path:
    """Write a checkpoint of a run folder. Collective over all ranks.

    The files go to a hidden folder that is renamed when all is on disk, so an interrupted
    save leaves the previous checkpoint untouched. Keeps the newest ``keep`` (0: all), and those
    of ``protected`` steps. ``tokenizer`` is the folder of the model's, which goes along.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Saves are synchronous, in this process: a plain queue does for the results. By default
    # Megatron-core starts a manager process on every rank (seconds) that outlives the save.
    filesystem_async._results_queue = queue.SimpleQueue()
    final = checkpoint_path(folder, progress.step)
    temporary = final.with_name(f".{final.name}.tmp")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    # Whole coverage is the engine's own invariant (tested); Megatron's check of it gathers
    # every shard's metadata on rank 0.
    dist_checkpointing.save(
        _sharded_tensors(state), str(temporary), validate_access_integrity=False
    )
    dist.barrier()
    if first:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, temporary / TOKENIZER_FOLDER)
        seal(temporary, progress, model)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        fsync_path(final.parent)
        kept = {checkpoint_path(folder, step) for step in protected}
        for old in checkpoints(folder)[:-keep] if keep else ():
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def load(state: ShardedState, checkpoint: Path) -> None:
    """Fill every piece from a checkpoint of any layout. Collective over all ranks.

    Raises:
        KeyError: the checkpoint lacks a tensor, or holds it in another shape.
    """
    from megatron.core import dist_checkpointing

    wanted = _sharded_tensors(state)
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    for tensor in wanted.values():
        found = stored.get(tensor.key)
        if found is None or tuple(found.global_shape) != tuple(tensor.global_shape):
            shape = "nothing" if found is None else tuple(found.global_shape)
            raise KeyError(f"{checkpoint}: {tensor.key} is {shape}, not {tensor.global_shape}")
    loaded = dist_checkpointing.load(wanted, str(checkpoint), validate_access_integrity=False)
    for index, piece in enumerate(state.pieces):
        if loaded[str(index)].data_ptr() != piece.data.data_ptr():
            piece.data.copy_(loaded[str(index)])


def load_weights(state: ShardedState, checkpoint: Path) -> None:
    """Fill the weights from a checkpoint of any layout and precision; optimizer state is left as
    it is. Collective over all ranks.

    A weight in fp32 (a master weight, or a run in fp32) takes the master weight where there is
    one; any other is rounded to the run's type.

    Raises:
        KeyError: the checkpoint lacks a tensor, or holds it in another shape.
    """
    import torch

    stored = stored_tensors(checkpoint)

    def source(piece: Piece) -> Piece:
        """The piece with the slot to read, in memory of that slot's type."""
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
