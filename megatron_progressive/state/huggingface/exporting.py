"""``mprog export hf``: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_progressive.config import ConfigError
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.models.huggingface import HUGGING_FACE, config_from_shape
from megatron_progressive.models.huggingface.tensors import Entry, NameMap
from megatron_progressive.runtime.files import write_json
from megatron_progressive.runtime.progress import show_bytes
from megatron_progressive.state.boxes import MASTER, PARAM
from megatron_progressive.state.checkpoint import read_description
from megatron_progressive.state.huggingface.folder import CONFIG_FILE, listed
from megatron_progressive.state.huggingface.safetensors import (
    DTYPE_NAMES,
    SHARD_BYTES,
    Header,
    SafetensorsWriter,
)
from megatron_progressive.state.new_folder import check_new_folder, new_folder
from megatron_progressive.state.stored import Slots, stored_tensors
from megatron_progressive.state.tokenizer_files import (
    copy_tokenizer,
    entries,
    special_tokens,
    tokenizer_files,
    tokenizer_of,
)

if TYPE_CHECKING:  # bad input is refused without loading torch
    import torch

    from megatron_progressive.state.streamed import TensorReader

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class Part:
    """Tensors of theirs that come from one read: of an entry, as a copy, or zeros."""

    source: Entry | None
    headers: tuple[Header, ...]


@dataclass(frozen=True)
class Export:
    """All that is to be written, checked."""

    checkpoint: Path
    out: Path
    config: dict[str, Any]
    """``config.json``."""
    parts: tuple[Part, ...]
    slots: dict[str, str]
    """Of our tensors: the slot that is read."""
    tokenizer: Path | None
    """Folder of the tokenizer; None where it is not known."""

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for part in self.parts for header in part.headers)


def plan_export(
    checkpoint: Path, out: Path, dtype: str | None = None, tokenizer: Path | None = None
) -> Export:
    """Check everything and derive what the folder holds. Creates nothing.

    Args:
        checkpoint: of any run, layout and engine, or an imported or expanded one.
        out: the folder to make.
        dtype: of the weights: ``float32`` (the master weights where there are) or ``bfloat16``;
            by default that in which the model computes.
        tokenizer: its folder; by default the one that the checkpoint keeps, if it does.

    Raises:
        ConfigError: no whole checkpoint, a model that transformers' class cannot be, another
            ``dtype``, a folder without a tokenizer or with one larger than the vocabulary, or an
            ``out`` that is there or has no room.
    """
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise ConfigError(f"--dtype: got {dtype!r}; accepted: {', '.join(DTYPE_NAMES)}")
    model = read_description(checkpoint)[1]
    shape = model.shape
    if not isinstance(shape, TransformerShape):
        raise ConfigError(
            f"checkpoint: {checkpoint} holds a model of family {shape.family}; accepted: "
            f"{', '.join(HUGGING_FACE)}"
        )
    if tokenizer is not None and not tokenizer_files(tokenizer):
        raise ConfigError(
            f"--tokenizer: {tokenizer} has no tokenizer; accepted: a folder with tokenizer.json"
        )
    config = config_from_shape(shape)
    stored = stored_tensors(checkpoint)
    _check_stored(checkpoint, stored, {n: s.shape for n, s in tensor_table(shape).items()})
    computed = "bfloat16" if model.precision == "bf16" else "float32"
    kept = dtype or computed
    slots = {
        name: MASTER if kept != computed and kept == "float32" and MASTER in found else PARAM
        for name, found in stored.items()
    }
    tokenizer = tokenizer or tokenizer_of(checkpoint)
    tokens: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        if (size := entries(tokenizer)) > shape.vocab_size:
            raise ConfigError(
                f"--tokenizer: got {tokenizer} with {size} entries; accepted: at most the "
                f"model's vocab_size {shape.vocab_size}"
            )
        tokens = special_tokens(tokenizer)
    # both names of the type: transformers 5 reads either, other readers know one
    config = {**config, **tokens, "dtype": kept, "torch_dtype": kept}
    parts = tuple(_parts(HUGGING_FACE[shape.family].name_map(shape), kept))
    plan = Export(checkpoint, out, config, parts, slots, tokenizer)
    check_new_folder(out, plan.nbytes)
    return plan


def _check_stored(
    checkpoint: Path, stored: dict[str, Slots], expected: dict[str, tuple[int, ...]]
) -> None:
    missing = [
        name
        for name, shape in expected.items()
        if PARAM not in stored.get(name, {}) or stored[name][PARAM].shape != shape
    ]
    if missing:
        raise ConfigError(
            f"checkpoint: {checkpoint} is {listed('missing', missing)}; accepted: all tensors of "
            "the model that it describes"
        )


def _parts(names: NameMap, dtype: str) -> Iterator[Part]:
    """All tensors of theirs, fp32 ones first (they stay aligned in a file of both types)."""

    def part(source: Entry, theirs: tuple[str, ...]) -> Part:
        kind = dtype if source.spec.trainable else "float32"
        shapes = zip(theirs, source.shapes(), strict=True)
        return Part(source, tuple(Header(name, shape, kind) for name, shape in shapes))

    for zeros in names.zeros:
        yield Part(None, (Header(zeros.theirs, zeros.shape, "float32"),))
    for entry in sorted(names.entries, key=lambda entry: entry.spec.trainable):
        yield part(entry, entry.theirs)
    for copy in names.copies:
        if copy.written:
            yield part(copy.of, (copy.theirs,))


def export_checkpoint(plan: Export, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the folder, one tensor of ours at a time; it appears when all of it is on disk.

    Args:
        shard_bytes: most bytes of one safetensors file.
    """
    from megatron_progressive.state.streamed import TensorReader

    headers = [header for part in plan.parts for header in part.headers]
    with new_folder(plan.out) as folder:
        reader = TensorReader(plan.checkpoint)
        with (
            SafetensorsWriter(folder, headers, shard_bytes) as writer,
            show_bytes("export", plan.nbytes) as advance,
        ):
            for part in plan.parts:
                for tensor in _tensors(plan, part, reader):
                    writer.write(tensor)
                advance(sum(header.nbytes for header in part.headers))
        write_json(folder / CONFIG_FILE, plan.config)
        tokens = {key: value for key, value in plan.config.items() if key.endswith("_token_id")}
        write_json(folder / GENERATION_FILE, {"_from_model_config": True, **tokens})
        if plan.tokenizer is not None:
            copy_tokenizer(plan.tokenizer, folder)


def _tensors(plan: Export, part: Part, reader: TensorReader) -> list[torch.Tensor]:
    import torch

    dtype = getattr(torch, part.headers[0].dtype)
    if part.source is None:
        return [torch.zeros(header.shape, dtype=dtype) for header in part.headers]
    name = part.source.ours
    return part.source.split(reader.read((name, plan.slots[name])).to(dtype))
