"""The tokenizer beside a model's weights: its files, and the ids of its special tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_progressive.config import CONFIG_FILE, ConfigError, load
from megatron_progressive.data import prepared_folder
from megatron_progressive.runtime.files import fsync_path

FOLDER = "tokenizer"
"""In a checkpoint and in a prepared corpus."""

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FILES = (*_VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "chat_template.jinja", "chat_template.json")  # fmt: skip
_SPECIAL = ("bos_token", "eos_token", "pad_token")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in ``folder``; none where there is no vocabulary."""
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        return []
    return [folder / name for name in _FILES if (folder / name).is_file()]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files, if there is one, into ``target``, which is made for them; and
    flush them to disk."""
    files = tokenizer_files(source)
    if files:
        target.mkdir(exist_ok=True)
    for file in files:
        shutil.copyfile(file, target / file.name)
        fsync_path(target / file.name)


def tokenizer_of(checkpoint: Path) -> Path | None:
    """The folder of the tokenizer that a checkpoint's model was trained with, where it is known:
    in the checkpoint, or in the prepared corpus of its run."""
    for folder in _candidates(checkpoint):
        if tokenizer_files(folder):
            return folder
    return None


def _candidates(checkpoint: Path) -> Iterator[Path]:
    yield checkpoint / FOLDER
    run = checkpoint.resolve().parent.parent
    try:
        config = load(run / CONFIG_FILE, resolved=True)
        # the run may have been started from another working directory
        yield (
            prepared_folder(replace(config, run=replace(config.run, dir=str(run.parent)))) / FOLDER
        )
        yield prepared_folder(config) / FOLDER
    except ConfigError:
        return  # no run folder, or its corpus is gone


def special_tokens(folder: Path) -> dict[str, int | None]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``; None where there is none."""
    settings = {
        **_json(folder / "special_tokens_map.json"),
        **_json(folder / "tokenizer_config.json"),
    }
    vocabulary = _vocabulary(folder)
    ids: dict[str, int | None] = {}
    for name in _SPECIAL:
        token = settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        ids[f"{name}_id"] = vocabulary.get(content) if isinstance(content, str) else None
    return ids


def entries(folder: Path) -> int:
    """One more than the greatest token id; 0 where the vocabulary is in a format that is not
    read here."""
    return max(_vocabulary(folder).values(), default=-1) + 1


def _vocabulary(folder: Path) -> dict[str, int]:
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception:  # the library raises bare Exception for a bad file
            raise ConfigError(
                f"tokenizer: {folder / 'tokenizer.json'} cannot be read; accepted: a tokenizer's"
            ) from None
        return dict(backend.get_vocab(with_added_tokens=True))
    vocabulary = {**_json(folder / "vocab.json"), **_json(folder / "added_tokens.json")}
    return {token: number for token, number in vocabulary.items() if isinstance(number, int)}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
