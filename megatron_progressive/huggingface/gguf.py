"""GGUF files, as llama.cpp has them, made into a model folder by transformers' own reader.

transformers passes over metadata and tensors of a GGUF that it does not know, and gives weights
that are missing random values. Here each such thing is refused by its name, as it is in
``config.json``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_progressive.checkpoints.new_folder import check_new_folder
from megatron_progressive.config import ConfigError
from megatron_progressive.config.places import check_readable
from megatron_progressive.huggingface.folder import listed
from megatron_progressive.huggingface.values import Findings, show
from megatron_progressive.models.huggingface.harmless import same
from megatron_progressive.runtime.progress import show_stages

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_ARCHITECTURES = ("llama", "qwen3", "gpt2")
"""The architectures of llama.cpp that are families here and that transformers reads."""
_PACKAGES = ("gguf", "accelerate")
is_installed = importlib.util.find_spec

_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
"""The metadata that a model's sizes are in, after the name of the architecture, and what
transformers calls them."""
_PARTS = {
    "llama": r"(token_embd|output|output_norm)\.weight"
    r"|blk\.\d+\.(attn_(q|k|v|output|norm)|ffn_(gate|up|down|norm))\.weight",
    "qwen3": r"(token_embd|output|output_norm)\.weight"
    r"|blk\.\d+\.(attn_(q|k|v|output|norm|q_norm|k_norm)|ffn_(gate|up|down|norm))\.weight",
    "gpt2": r"(token_embd|position_embd|output)\.weight|output_norm\.(weight|bias)"
    r"|blk\.\d+\.(attn_(qkv|output|norm)|ffn_(up|down|norm))\.(weight|bias)",
}
"""The tensors of each architecture that transformers takes."""


@dataclass(frozen=True)
class _Header:
    architecture: str
    metadata: dict[str, Any]
    """Everything but the vocabulary, by name."""
    tensors: dict[str, str]
    """The type of each tensor (``Q4_1``, ``F32``), by name."""
    nbytes: int
    """The bytes of all weights in float32."""


@dataclass(frozen=True)
class Made:
    """A folder that was made of a GGUF file."""

    folder: Path
    origin: dict[str, Any]
    """What a record should keep of the file: its name and its tensors by type."""
    passed_over: dict[str, str]
    """The metadata and tensors that were passed over because the user allowed it."""
    notes: tuple[str, ...]
    """What the user should know."""

    def unread_names(self, allowed: Collection[str]) -> set[str]:
        """The words among ``allowed`` that the file had a use for."""
        return {key for key in allowed for name in self.passed_over
                if f"{name}.".startswith(f"{key}.")}  # fmt: skip


@contextmanager
def as_folder(file: Path, out: Path, allowed: Collection[str] = ()) -> Iterator[Made]:
    """The model of a GGUF file as a folder of transformers with float32 weights, which is there
    until the context ends. All of the weights are in memory while it is made.

    Args:
        file: the GGUF file.
        out: what is made of it; the folder is beside it, and has a hidden name.
        allowed: names of metadata and tensors that are passed over although transformers does not
            read them.

    Raises:
        ConfigError: the package ``gguf`` or ``accelerate`` is missing, the file is no GGUF or
            another architecture, transformers would not read all of it, or ``out`` is there or has
            no room.
    """
    header, passed_over = _checked(file, allowed)
    check_new_folder(out, 2 * header.nbytes)  # the folder and the checkpoint
    temporary = out.with_name(f".{out.name}.gguf.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a command that was killed
    try:
        with show_stages("import") as say:
            say(f"dequantising {file.name}, {len(header.tensors)} tensors")
            temporary.mkdir()
            _write(file, temporary)
        counts = Counter(header.tensors.values()).most_common()
        types = ", ".join(f"{count} {kind}" for kind, count in counts)
        notes = [f"{file.name} {name}: {text}; allowed" for name, text in passed_over.items()]
        notes.append(f"{file.name}: tensors {types}, dequantised to float32")
        if kind := header.metadata.get("tokenizer.ggml.pre"):
            notes.append(
                f"the tokenizer is what transformers makes of {file.name}, whose "
                f"tokenizer.ggml.pre is {kind}: export hf --tokenizer takes the original one"
            )
        origin = {"from": file.name, "tensors": types}
        yield Made(temporary, origin, passed_over, tuple(notes))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checked(file: Path, allowed: Collection[str]) -> tuple[_Header, dict[str, str]]:
    check_readable("FOLDER", file)
    with open(file, "rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise ConfigError(f"FOLDER: {file} is no GGUF; accepted: one, whole")
    missing = [name for name in _PACKAGES if is_installed(name) is None]
    if missing:
        raise ConfigError(
            f"FOLDER: got {file}, and {' and '.join(missing)} is not installed; accepted: with it "
            "(pip install 'megatron_progressive[gguf]')"
        )
    header = _read(file)
    if header.architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{file.name} general.architecture: got {show(header.architecture)}; accepted: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    findings = Findings(allowed, file=file.name)
    _check(header, _description(file), findings)
    findings.refuse()
    return header, findings.passed_over


def _read(file: Path) -> _Header:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not re.fullmatch(r"tokenizer\.ggml\.(tokens|scores|token_type|merges)", name)
        }
        tensors = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        nbytes = sum(4 * int(tensor.n_elements) for tensor in reader.tensors)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(f"FOLDER: {file} is damaged ({cause}); accepted: a whole file") from None
    return _Header(str(metadata.get("general.architecture")), metadata, tensors, nbytes)


def _description(file: Path) -> Any:
    """What transformers takes the model for."""
    from transformers import AutoConfig

    with _quiet():
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def _check(header: _Header, config: Any, findings: Findings) -> None:
    """Note what transformers passes over, or takes for something else."""
    prefix = f"{header.architecture}."
    known = re.compile(_PARTS[header.architecture])

    def refuse(name: str, got: object, accepted: str) -> None:
        findings.add(name, f"got {show(got)}; accepted: {accepted}", can_be_allowed=True)

    for name, value in header.metadata.items():
        field = _SIZES.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if field is not None:
            taken = _taken(config, field)
            if not same(value, taken):
                refuse(name, value, f"{show(taken)}, which transformers takes it for")
        elif name.startswith(prefix):
            refuse(name, value, "nothing (transformers does not read it)")
    if header.metadata.get("split.count", 0) not in (0, 1):
        refuse("split.count", header.metadata["split.count"], "1 (one file with the whole model)")
    for name, kind in header.tensors.items():
        if not known.fullmatch(name):
            refuse(name, kind, "no such tensor (transformers does not read it)")


def _taken(config: Any, field: str) -> Any:
    if field == "rope_theta":
        return (getattr(config, "rope_parameters", None) or {}).get(field)
    if field == "head_dim":
        default = config.hidden_size // config.num_attention_heads
        return getattr(config, field, None) or default
    if field == "intermediate_size" and config.model_type == "gpt2":
        return config.n_inner or 4 * config.hidden_size
    return getattr(config, field, None)


def _write(file: Path, folder: Path) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports deepspeed, which says more
    import accelerate  # noqa: F401 (which is not to be imported without standard error)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _quiet():
        model, found = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
        missing = sorted(found["missing_keys"])
        if missing:
            raise ConfigError(f"FOLDER: {file} is {listed('missing', missing)}; accepted: all")
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own lines, and in a log without its bars."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    # never closed: a library may keep what it takes for standard error
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stderr(bars):
            yield
    finally:
        transformers.logging.set_verbosity(before)
