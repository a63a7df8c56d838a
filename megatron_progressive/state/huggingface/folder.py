"""What a Hugging Face model folder holds, from its headers alone; needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError
from megatron_progressive.models.huggingface.family import HuggingFaceFamily
from megatron_progressive.models.huggingface.tensors import NameMap
from megatron_progressive.state.huggingface.safetensors import INDEX_FILE, SINGLE_FILE

CONFIG_FILE = "config.json"
_NAMED = 8
"""Most tensors of a kind that an error names."""


@dataclass(frozen=True)
class TheirTensor:
    """One tensor of a safetensors file."""

    file: str
    name: str
    """In the file; the canonical one may have a prefix before it."""
    shape: tuple[int, ...]
    dtype: str
    """As the format has it: ``F32``, ``BF16``, ``F16``, ..."""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(
            f"folder: no file {path}; accepted: a folder with {CONFIG_FILE} and safetensors"
        ) from None
    except ValueError:
        raise ConfigError(f"folder: {path} is not JSON; accepted: a JSON object") from None
    if not isinstance(values, dict):
        raise ConfigError(f"folder: {path} holds no JSON object; accepted: one")
    return values


def read_config(folder: Path) -> dict[str, Any]:
    """The values of ``config.json``.

    Raises:
        ConfigError: no such folder or file, or it is not a JSON object.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"folder: no folder {folder}; accepted: one with {CONFIG_FILE} and safetensors"
        )
    return _read_json(folder / CONFIG_FILE)


def read_tensors(folder: Path, known: HuggingFaceFamily) -> dict[str, TheirTensor]:
    """Every tensor of the folder's safetensors files by its canonical name, buffers left out.

    Raises:
        ConfigError: no safetensors, or a file that is missing or damaged.
    """
    if (folder / INDEX_FILE).is_file():
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"folder: {folder / INDEX_FILE} has no weight_map; accepted: one")
        files = sorted({str(name) for name in weight_map.values()})
    elif (folder / SINGLE_FILE).is_file():
        files = [SINGLE_FILE]
    else:
        raise ConfigError(
            f"folder: {folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; accepted: a folder "
            "with safetensors"
        )
    found: dict[str, TheirTensor] = {}
    for file in files:
        for tensor in _tensors_of(folder, file):
            found[tensor.name] = tensor
    prefix = known.base_prefix
    if not any(name.startswith(prefix) for name in found):
        found = {n if n.startswith("lm_head.") else prefix + n: t for n, t in found.items()}
    return {name: t for name, t in found.items() if not re.fullmatch(known.ignored, name)}


def _tensors_of(folder: Path, file: str) -> list[TheirTensor]:
    from safetensors import SafetensorError, safe_open

    path = folder / file
    if not path.is_file():
        raise ConfigError(f"folder: no file {path}; accepted: all files of its {INDEX_FILE}")
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
    """Whether a folder has the tensors of the model that its ``config.json`` describes.

    Raises:
        ConfigError: tensors that are missing, not of the model, of another shape or of another
            type; all of them in one line.
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
            ("of a type other than " + " and ".join(accepted), types),
        )
        if words
    ]
    if wrong:
        raise ConfigError(
            f"folder: tensors of {folder}: {'; '.join(wrong)}; accepted: those of its {CONFIG_FILE}"
        )


def listed(what: str, words: list[str]) -> str:
    """``missing a, b and 7 more``."""
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return f"{what} {', '.join(words[:_NAMED])}{more}"
