"""``mprog export hf``: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_progressive.checkpoints.checkpoint import read_whole
from megatron_progressive.checkpoints.index import Slots, stored_tensors
from megatron_progressive.checkpoints.new_folder import check_new_folder, new_folder
from megatron_progressive.checkpoints.tokenizer_files import (
    TOKENS,
    copy_tokenizer,
    entries,
    special_tokens,
    tokenizer_of,
    usage_of,
)
from megatron_progressive.config import ConfigError
from megatron_progressive.data.tokenizer_folder import (
    GENERATION,
    KEPT_CONFIG,
    read_object,
    tokenizer_files,
    usage_files,
)
from megatron_progressive.huggingface import HUGGING_FACE, config_from_shape
from megatron_progressive.huggingface.finite import FiniteWeights
from megatron_progressive.huggingface.folder import CONFIG_FILE, listed
from megatron_progressive.huggingface.safetensors import (
    DTYPE_NAMES,
    SHARD_BYTES,
    Header,
    SafetensorsWriter,
)
from megatron_progressive.huggingface.tensors import Entry, NameMap
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.reshard.boxes import MASTER, PARAM
from megatron_progressive.runtime.files import write_atomically, write_json
from megatron_progressive.runtime.progress import show_bytes

if TYPE_CHECKING:  # bad input is refused without loading torch
    import torch

    from megatron_progressive.checkpoints.streamed import TensorReader


CARD_FILE = "README.md"


@dataclass(frozen=True)
class Part:
    """Tensors of theirs that come from one read of ours: those of an entry, a copy, or zeros."""

    source: Entry | None
    headers: tuple[Header, ...]


@dataclass(frozen=True)
class Export:
    """Everything that is to be written, after it has been checked."""

    checkpoint: Path
    out: Path
    config: dict[str, Any]
    """The content of ``config.json``."""
    parts: tuple[Part, ...]
    slots: dict[str, str]
    """The slot that is read of each of our tensors."""
    tokenizer: Path | None
    """The folder of the tokenizer; None where there is none."""
    generation: dict[str, Any]
    """The content of ``generation_config.json``."""
    notes: tuple[str, ...]
    """What the user should know, such as what is left behind, one line for each thing."""
    card: str | None = None
    """The text of the model card, ``README.md``; None for a folder without one."""

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for part in self.parts for header in part.headers)


def plan_export(
    checkpoint: Path, out: Path, dtype: str | None = None, tokenizer: Path | None = None
) -> Export:
    """Check everything, and derive what the folder will hold. Nothing is created.

    Args:
        checkpoint: a checkpoint of any run, layout and engine, or one that was imported or
            expanded.
        out: the folder to make.
        dtype: the type of the weights: ``float32`` (the master weights, where there are any) or
            ``bfloat16``; by default the type in which the model computes.
        tokenizer: the folder of the tokenizer; by default the one that the checkpoint keeps, if it
            keeps one.

    Raises:
        ConfigError: there is no whole checkpoint, transformers' class cannot express the model,
            ``dtype`` is another one, the folder has no tokenizer or one larger than the vocabulary,
            or ``out`` exists or has no room.
    """
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise ConfigError(f"--dtype: got {dtype!r}; accepted: {', '.join(DTYPE_NAMES)}")
    position, model = read_whole(checkpoint)
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
    notes = []
    usage = usage_of(checkpoint)
    if tokenizer is not None and usage is not None and usage.resolve() != tokenizer.resolve():
        given = {file.name for file in usage_files(tokenizer)}
        lost = [file.name for file in usage_files(usage) if file.name not in given]
        if lost:
            notes.append(f"--tokenizer: {listed('left behind', lost)} of {usage}")
        usage = tokenizer
    own = tokenizer_of(checkpoint) if tokenizer is None else None
    if tokenizer is not None and (size := entries(tokenizer)) > shape.vocab_size:
        raise ConfigError(
            f"--tokenizer: got {tokenizer} with {size} entries; accepted: at most the model's "
            f"vocab_size {shape.vocab_size}"
        )
    if own is not None and (size := entries(own)) > shape.vocab_size:  # as it was imported
        notes.append(
            f"the tokenizer has {size} entries, the model {shape.vocab_size}: it has no weights "
            "for the last ones"
        )
    tokenizer = tokenizer or own
    if tokenizer is None:
        notes.append("no tokenizer found: exported without one (--tokenizer FOLDER)")
    model_type = HUGGING_FACE[shape.family].model_type
    more, generation, passed = _usage(usage, tokenizer, model_type, position.step > 0)
    notes += passed
    # both names of the type: transformers 5 reads either, other readers know one
    config = {**config, **more, "dtype": kept, "torch_dtype": kept}
    parts = tuple(_parts(HUGGING_FACE[shape.family].name_map(shape), kept))
    plan = Export(checkpoint, out, config, parts, slots, tokenizer, generation, tuple(notes))
    check_new_folder(out, plan.nbytes)
    return plan


def _usage(
    usage: Path | None, tokenizer: Path | None, model_type: str, trained: bool
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What ``config.json`` has beside the model itself, the content of ``generation_config.json``,
    and what the user should know.

    An imported model has its own. Tokens that neither file names are the tokenizer's, or those of
    transformers' class where there is no tokenizer. A model that was trained ends its texts as its
    corpus does.
    """
    found = None if usage is None else read_object(usage / GENERATION)
    kept = (None if usage is None else read_object(usage / KEPT_CONFIG)) or {}
    own = kept.pop("model_type", None) == model_type
    if not own:  # its tokens go for any model
        kept = {key: value for key, value in kept.items() if key.endswith("_token_id")}
    tokens: dict[str, Any] = {}
    if tokenizer is not None:
        tokens = special_tokens(tokenizer)
    elif not own:  # not the class's, which mean nothing here
        tokens = dict.fromkeys(TOKENS)
    notes, end = [], tokens.get("eos_token_id") if trained else None
    for values in (kept, found or {}):
        if end is None or "eos_token_id" not in values:
            continue
        ends = values["eos_token_id"]
        if end not in (ends if isinstance(ends, list) else [ends]):
            values["eos_token_id"] = end
            notes = [f"eos_token_id: {end}, which ends the run's documents, instead of {ends}"]
    tokens |= {key: found[key] for key in TOKENS if found and found.get(key) is not None}
    kept = {**tokens, **kept}
    ids = {key: kept[key] for key in TOKENS if key in kept}
    return kept, {"_from_model_config": True, **ids} if found is None else found, notes


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
    """All tensors of theirs, those in fp32 first, so that they stay aligned in a file of both
    types."""

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
    """Write the folder, one tensor of ours at a time; it appears once all of it is on disk.

    Args:
        shard_bytes: the most bytes of one safetensors file.

    Raises:
        ConfigError: some weights are NaN or infinite.
    """
    from megatron_progressive.checkpoints.streamed import TensorReader

    headers = [header for part in plan.parts for header in part.headers]
    with new_folder(plan.out) as folder:
        reader, weights = TensorReader(plan.checkpoint), FiniteWeights()
        with (
            SafetensorsWriter(folder, headers, shard_bytes) as writer,
            show_bytes("export", plan.nbytes) as advance,
        ):
            done = 0
            for part in plan.parts:
                advance(done)
                tensors = _tensors(plan, part, reader)
                for header, tensor in zip(part.headers, tensors, strict=True):
                    writer.write(weights.look(header.name, tensor))
                done = sum(header.nbytes for header in part.headers)
            weights.refuse(f"checkpoint: {plan.checkpoint}")
            advance(done)
        write_json(folder / CONFIG_FILE, plan.config)
        write_json(folder / GENERATION, plan.generation)
        if plan.tokenizer is not None:
            copy_tokenizer(plan.tokenizer, folder, usage=False)
        if plan.card is not None:
            write_atomically(folder / CARD_FILE, plan.card)


def _tensors(plan: Export, part: Part, reader: TensorReader) -> list[torch.Tensor]:
    import torch

    dtype = getattr(torch, part.headers[0].dtype)
    if part.source is None:
        return [torch.zeros(header.shape, dtype=dtype) for header in part.headers]
    name = part.source.ours
    return part.source.split(reader.read((name, plan.slots[name])).to(dtype))
