"""What a Hugging Face model folder holds, as its headers alone tell. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError
from megatron_progressive.data.tokenizer_folder import read_object, tokenizer_files, usage_files
from megatron_progressive.huggingface.family import HuggingFaceFamily
from megatron_progressive.huggingface.safetensors import INDEX_FILE, SINGLE_FILE
from megatron_progressive.huggingface.tensors import NameMap

CONFIG_FILE = "config.json"
_NAMED = 8
"""The most tensors of one kind that an error names."""
_POINTER = b"version https://git-lfs"
"""The first bytes of a file that Git LFS has not fetched."""

CARD_TAG = "progressive-training"
"""The tag of the model cards that exports have."""


@dataclass(frozen=True)
class TheirTensor:
    """One tensor in a safetensors file."""

    file: str
    name: str
    """Its name in the file; the canonical name may lack a prefix."""
    shape: tuple[int, ...]
    dtype: str
    """Its type as the format names it: ``F32``, ``BF16``, ``F16``, ..."""


def read_config(folder: Path) -> dict[str, Any]:
    """The values of ``config.json``.

    Raises:
        ConfigError: there is no such folder or file, or the file is not a JSON object.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"folder: no folder {folder}; accepted: one with {CONFIG_FILE} and safetensors, or a "
            "GGUF"
        )
    values = read_object(folder / CONFIG_FILE)
    if values is None:
        ggufs = sorted(folder.glob("*.gguf"))
        file = f", or a GGUF itself ({ggufs[0]})" if ggufs else ""
        raise ConfigError(
            f"folder: no file {folder / CONFIG_FILE}; accepted: a folder with {CONFIG_FILE} and "
            f"safetensors{file}"
        )
    return values


def read_tensors(folder: Path, known: HuggingFaceFamily) -> dict[str, TheirTensor]:
    """The tensors of the folder's safetensors files by their canonical names, without buffers.

    Raises:
        ConfigError: there are no safetensors, a file is missing or damaged, or two files have a
            tensor of the same name.
    """
    found: dict[str, TheirTensor] = {}
    for file in weight_files(folder):
        for tensor in _tensors_of(folder, file):
            if tensor.name in found:
                raise ConfigError(
                    f"folder: tensor {tensor.name} of {folder} is in {found[tensor.name].file} "
                    f"and in {file}; accepted: one of each name"
                )
            found[tensor.name] = tensor
    prefix = known.base_prefix
    if not any(name.startswith(prefix) for name in found):
        found = {n if n.startswith("lm_head.") else prefix + n: t for n, t in found.items()}
    return {name: t for name, t in found.items() if not re.fullmatch(known.ignored, name)}


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files of a folder. As in transformers this is the file of the
    whole model, where there is one.

    Raises:
        ConfigError: there are none, or files that the index names are missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    index = read_object(folder / INDEX_FILE)
    if index is None:
        others = sorted(p.name for kind in ("bin", "pt", "pth", "h5", "gguf", "msgpack")
                        for p in folder.glob(f"*.{kind}"))  # fmt: skip
        instead = f" but {listed('only', others)}, which is not read" if others else ""
        raise ConfigError(
            f"folder: {folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{instead}; accepted: a "
            "folder with safetensors (save_pretrained writes them)"
        )
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"folder: {folder / INDEX_FILE} has no weight_map; accepted: one")
    files = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"folder: {folder} lacks {listed('the file', missing)}; accepted: all files of its "
            f"{INDEX_FILE}"
        )
    return files


def left_behind(folder: Path) -> list[str]:
    """The names of the files of which an import takes nothing, without hidden ones and without a
    model card that an export has written, which the next export writes anew."""
    taken = {CONFIG_FILE, INDEX_FILE, *weight_files(folder)}
    card = folder / "README.md"
    if card.is_file() and CARD_TAG in card.read_text(encoding="utf-8", errors="replace"):
        taken.add(card.name)
    used = (*tokenizer_files(folder), *usage_files(folder))
    taken |= {path.relative_to(folder).parts[0] for path in used}
    names = (f"{p.name}/" if p.is_dir() else p.name for p in sorted(folder.iterdir()))
    return [n for n in names if n.rstrip("/") not in taken and not n.startswith(".")]


def _tensors_of(folder: Path, file: str) -> list[TheirTensor]:
    from safetensors import SafetensorError, safe_open

    path = folder / file
    with open(path, "rb") as opening:
        if opening.read(len(_POINTER)) == _POINTER:
            raise ConfigError(
                f"folder: {path} is a pointer of Git LFS; accepted: the file itself (git lfs pull)"
            )
    try:
        with safe_open(path, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return [
                TheirTensor(file, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            ]
    except SafetensorError as error:
        cause = " ".join(str(error).split())
        raise ConfigError(f"folder: {path} is damaged ({cause}); accepted: a whole file") from None


def check_tensors(
    folder: Path, found: dict[str, TheirTensor], names: NameMap, dtypes: Iterable[str]
) -> None:
    """Check that a folder has the tensors of the model that its ``config.json`` describes.

    Raises:
        ConfigError: tensors are missing, do not belong to the model, or have another shape or type;
            one line names them all.
    """
    required, optional, accepted = names.required(), names.optional(), tuple(dtypes)
    written = {copy.theirs for copy in names.copies if copy.written}
    known = {**optional, **required}
    shapes = [
        f"{name} {list(tensor.shape)} instead of {list(known[name])}"
        for name, tensor in found.items()
        if name in known and tensor.shape != known[name]
    ]
    types = [f"{n} {t.dtype}" for n, t in found.items() if n in known and t.dtype not in accepted]
    wrong = [
        listed(what, words)
        for what, words in (
            ("missing", [name for name in (*required, *written) if name not in found]),
            ("not of the model", [name for name in found if name not in known]),
            ("of another shape", shapes),
            ("of a type other than " + ", ".join(accepted), types),
        )
        if words
    ]
    if wrong:
        raise ConfigError(
            f"folder: tensors of {folder}: {'; '.join(wrong)}; accepted: those of its {CONFIG_FILE}"
        )


def listed(what: str, words: list[str]) -> str:
    """A list in words, as ``missing a, b and 7 more``."""
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return f"{what} {', '.join(words[:_NAMED])}{more}"
