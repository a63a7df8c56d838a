"""``mprog import hf``: a model folder of Hugging Face, or a GGUF file, as a checkpoint of step 0
with weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_progressive.checkpoints.checkpoint import TrainingPosition, seal
from megatron_progressive.checkpoints.index import StoredTensor
from megatron_progressive.checkpoints.new_folder import check_new_folder, new_folder
from megatron_progressive.checkpoints.record import ModelRecord
from megatron_progressive.checkpoints.tokenizer_files import FOLDER, copy_tokenizer
from megatron_progressive.config import ConfigError, OptimSection, RunSection
from megatron_progressive.data.tokenizer_folder import (
    GENERATION,
    KEPT_CONFIG,
    read_object,
    token_settings,
)
from megatron_progressive.huggingface import gguf, read_description
from megatron_progressive.huggingface.finite import FiniteWeights
from megatron_progressive.huggingface.folder import (
    TheirTensor,
    check_tensors,
    left_behind,
    listed,
    read_config,
    read_tensors,
)
from megatron_progressive.huggingface.tensors import Entry, NameMap
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.reshard.boxes import PARAM
from megatron_progressive.runtime.files import write_json
from megatron_progressive.runtime.progress import show_bytes

if TYPE_CHECKING:  # bad input is refused without loading torch
    import torch

LAYOUT = "imported"
"""The layout that an imported checkpoint names, since no job has saved it."""

_TYPES = ("F32", "BF16", "F16")
"""The types that weights may have; fp32 holds all values of each."""

_MAPPED_BYTES = 64 << 20
"""How many bytes are read from one mapping of a file, apart from the rest of a tensor."""


@dataclass(frozen=True)
class Import:
    """Everything that is to be written, after it has been checked."""

    folder: Path
    out: Path
    shape: TransformerShape
    names: NameMap
    found: dict[str, TheirTensor]
    """Their tensors, by canonical name."""
    dtype: str
    """The type of the weights: ``bfloat16`` where all of theirs have it, else ``float32``."""
    without_modules: int
    """The number of prediction modules that ``config.json`` names and the files do not have."""
    kept: dict[str, Any]
    """The keys of ``config.json`` that an export gives back, and the model type to which they
    belong."""
    origin: dict[str, Any]
    """Where the model comes from, and what is passed over, as the record of the checkpoint keeps
    it: ``from`` (the name of the folder or file), ``allowed`` (the keys that the user allowed, and
    what they have), and of a GGUF its ``tensors`` by type."""
    notes: tuple[str, ...]
    """What the user should know, such as what is passed over, left behind or changed, one line for
    each thing."""

    def stored(self, entry: Entry) -> StoredTensor:
        """Our tensor as the checkpoint holds it."""
        return StoredTensor(entry.spec.shape, self.dtype if entry.spec.trainable else "float32")

    @property
    def nbytes(self) -> int:
        return sum(self.stored(entry).nbytes for entry in self.names.entries)

    @property
    def model(self) -> ModelRecord:
        """The model of the checkpoint; what no training has decided has a run's default."""
        optim = OptimSection()
        return ModelRecord(
            shape=self.shape,
            precision="bf16" if self.dtype == "bfloat16" else "fp32",
            optimizer=optim.name,
            embeddings=optim.embeddings,
            seed=RunSection().seed,
            layout=LAYOUT,
            depth_history=((0, self.shape.num_layers),),
            imported=self.origin,
        )


@contextmanager
def opened_import(source: Path, out: Path, allowed: Sequence[str] = ()) -> Iterator[Import]:
    """What :func:`plan_import` gives for a folder or a GGUF file. Inside of the context it can be
    written; the folder that a GGUF is made into (:func:`.gguf.as_folder`) is gone afterwards."""
    if source.suffix != gguf.SUFFIX or source.is_dir():
        yield plan_import(source, out, allowed)
        return
    with gguf.as_folder(source, out, allowed) as made:
        used = made.unread_names(allowed)
        plan = plan_import(made.folder, out, [key for key in allowed if key not in used])
        origin = {**plan.origin, **made.origin}
        origin["allowed"] = {**made.passed_over, **plan.origin["allowed"]}
        yield replace(plan, origin=origin, notes=(*made.notes, *plan.notes))


def plan_import(folder: Path, out: Path, allowed: Sequence[str] = ()) -> Import:
    """Check everything, and derive what the checkpoint will hold. Nothing is created.

    Args:
        folder: a folder with ``config.json`` and safetensors.
        out: the folder of the new checkpoint.
        allowed: keys of ``config.json`` that are passed over although the family does not have what
            they say.

    Raises:
        ConfigError: the architecture is another one, ``config.json`` has an option that the family
            does not have, tensors are missing, do not belong to the model or have another shape or
            type, a file is damaged, or ``out`` exists or has no room.
    """
    values = read_config(folder)
    described = read_description(values, allowed)
    known, shape = described.known, described.shape
    read_object(folder / GENERATION)  # which are copied, if they are readable
    token_settings(folder)
    found = read_tensors(folder, known)
    without = 0
    modules = tuple(
        f"model.layers.{number}."
        for number in range(shape.num_layers, shape.num_layers + shape.mtp_depth)
    )
    if modules and not any(name.startswith(modules) for name in found):
        without = shape.mtp_layers  # transformers' own files: it trains without them
        shape = replace(shape, mtp_layers=0)
    names = known.name_map(shape)
    check_tensors(folder, found, names, _TYPES)
    types = {found[name].dtype for e in names.entries if e.spec.trainable for name in e.theirs}
    dtype = "bfloat16" if types == {"BF16"} else "float32"  # which holds the others exactly
    notes = [
        f"config.json {name}: {text}; allowed: the model goes without it"
        for name, text in described.findings.passed_over.items()
    ]
    notes += [f"--allow {key}: not needed" for key in described.findings.unneeded()]
    if without:
        notes.append("the files have no multi-token prediction modules: imported without")
    if not types <= {"F32"} and dtype == "float32":
        notes.append(f"weights in {' and '.join(sorted(types))}: kept as float32, exactly")
    if names_left := left_behind(folder):
        notes.append(f"{listed('left behind:', names_left)} (no part of model or tokenizer)")
    kept = {"model_type": known.model_type, **described.kept}
    origin = {"from": folder.resolve().name, "allowed": dict(described.findings.passed_over)}
    plan = Import(folder, out, shape, names, found, dtype, without, kept, origin, tuple(notes))
    check_new_folder(out, plan.nbytes)
    return plan


def import_folder(plan: Import) -> None:
    """Write the checkpoint, one tensor of ours at a time; it appears once all of it is on disk.

    Raises:
        ConfigError: some weights are NaN or infinite, or a tensor that repeats another one in such
            a model differs from it.
    """
    from megatron_progressive.checkpoints.streamed import TensorWriter

    position = TrainingPosition(0, 0, plan.shape.num_layers, 0, 0.0, 0.0, 0.0)
    with new_folder(plan.out) as folder:
        with (
            _Reader(plan) as reader,
            TensorWriter(folder) as writer,
            show_bytes("import", plan.nbytes) as advance,
        ):
            _check_copies(plan, reader)
            done = 0
            for entry in plan.names.entries:
                advance(done)
                writer.write((entry.ours, PARAM), _value(plan, reader, entry))
                done = plan.stored(entry).nbytes
            reader.weights.refuse(f"folder: {plan.folder}")
            advance(done)
        copy_tokenizer(plan.folder, folder / FOLDER)
        (folder / FOLDER).mkdir(exist_ok=True)
        write_json(folder / FOLDER / KEPT_CONFIG, plan.kept)
        seal(folder, position, plan.model)


def _value(plan: Import, reader: _Reader, entry: Entry) -> torch.Tensor:
    import torch

    dtype = getattr(torch, plan.stored(entry).dtype)
    return entry.join([reader.read(name).to(dtype) for name in entry.theirs])


def _check_copies(plan: Import, reader: _Reader) -> None:
    import torch

    for copy in plan.names.copies:
        (original,) = copy.of.theirs
        if copy.theirs not in plan.found:
            continue
        same = torch.equal(reader.read(copy.theirs), reader.read(original))
        if not same and reader.weights.passed(original):  # NaN, which differs, is refused later
            raise ConfigError(
                f"folder: tensor {copy.theirs} of {plan.folder} differs from {original}; "
                "accepted: the same values (the model has them once)"
            )


class _Reader:
    """A reader of their tensors. It maps files instead of loading them, one at a time, and maps a
    file anew now and then, so that what has been read does not count as used memory."""

    def __init__(self, plan: Import) -> None:
        self._plan = plan
        self._stack = ExitStack()
        self._name: str | None = None
        self._file: Any = None
        self._read = 0
        self.weights = FiniteWeights()

    def read(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        place = self._plan.found[name]
        if place.file != self._name or self._read > _MAPPED_BYTES:
            self._stack.close()
            opened: Any = safe_open(self._plan.folder / place.file, framework="pt")
            self._file = self._stack.enter_context(opened)
            self._name, self._read = place.file, 0
        tensor: torch.Tensor = self._file.get_tensor(place.name)
        self._read += tensor.nbytes
        return self.weights.look(name, tensor)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file = None
        self._stack.close()
