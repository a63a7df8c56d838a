"""Which files of a folder belong to its tokenizer, as transformers writes and finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError

SETTINGS = "tokenizer_config.json"
_TOKENS = "special_tokens_map.json"
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tiktoken.model", "tekken.json",
)  # fmt: skip
"""The files with a vocabulary; a folder with none of them has no tokenizer."""

_OTHERS = (
    "merges.txt", SETTINGS, _TOKENS, "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "normalizer.json", "tokenizer.*.json", "tokenizer.model.*", "tokenization_*.py",
)  # fmt: skip

GENERATION = "generation_config.json"
"""The file beside a tokenizer that says how a model generates text by default."""
KEPT_CONFIG = "kept_config.json"
"""The file of an imported model with the keys of ``config.json`` that do not decide what the
weights compute."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in ``folder``; none where there is no vocabulary."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        return []
    found = [path for name in (*VOCABULARIES, *_OTHERS) for path in sorted(folder.glob(name))]
    return [path for path in dict.fromkeys(found) if path.is_file()]


def usage_files(folder: Path) -> list[Path]:
    """The files in ``folder`` that say how its model is used, without those of the tokenizer."""
    return [folder / name for name in (GENERATION, KEPT_CONFIG) if (folder / name).is_file()]


def read_object(path: Path, field: str = "folder") -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file.

    Args:
        path: the path of the file.
        field: the field that named its folder, for the error.

    Raises:
        ConfigError: the file is not a JSON object, or cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        wrong = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        wrong = "is not JSON"
    else:
        if isinstance(values, dict):
            return values
        wrong = "holds no JSON object"
    raise ConfigError(f"{field}: got {path}, which {wrong}; accepted: a JSON object")


def token_settings(folder: Path, field: str = "folder") -> dict[str, Any]:
    """The content of ``tokenizer_config.json`` with the special tokens of
    ``special_tokens_map.json``. As in transformers these replace its own, unless it lists its added
    tokens.

    Raises:
        ConfigError: one of the files is not a JSON object.
    """
    settings = read_object(folder / SETTINGS, field) or {}
    tokens = read_object(folder / _TOKENS, field) or {}
    listed = "added_tokens_decoder" in settings
    first, last = (tokens, settings) if listed else (settings, tokens)
    return {**first, **{key: value for key, value in last.items() if value is not None}}


def declared(settings: dict[str, Any], token: str) -> str | None:
    """The value that :func:`token_settings` has for ``eos_token`` or another token; None where it
    has none."""
    value = settings.get(token)
    content = value.get("content") if isinstance(value, dict) else value  # or an AddedToken
    return content if isinstance(content, str) else None
