"""The tokenizer beside a model's weights, and the other files and token ids that its users go
by."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_progressive.config import CONFIG_FILE, ConfigError, load
from megatron_progressive.data.tokenizer_folder import (
    declared,
    read_object,
    token_settings,
    tokenizer_files,
    usage_files,
)
from megatron_progressive.runtime.files import fsync_path

FOLDER = "tokenizer"
"""The tokenizer's folder in a checkpoint and in a prepared corpus."""

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_tokenizer(source: Path, target: Path, *, usage: bool = True) -> None:
    """Copy the files of a tokenizer, if there is one, into the folder ``target``, which is made for
    them, and flush them to disk.

    Args:
        usage: whether to copy the files that say how the model is used, too; these may be there
            without a tokenizer.
    """
    for file in (*tokenizer_files(source), *(usage_files(source) if usage else ())):
        copied = target / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)
        fsync_path(copied)


def usage_of(checkpoint: Path) -> Path | None:
    """The folder that says how a checkpoint's model is used, where there is one: the checkpoint's
    own, or that of the checkpoint from which its run started, unless that one has another
    tokenizer."""
    own = tokenizer_of(checkpoint)
    for folder in (checkpoint / FOLDER, own):
        if folder is not None and usage_files(folder):
            return folder
    try:
        start = load(checkpoint.resolve().parent.parent / CONFIG_FILE, resolved=True).run.init_from
    except ConfigError:
        return None
    if start is None or not usage_files(first := Path(start) / FOLDER):
        return None
    other = own is not None and tokenizer_files(first) and _vocabulary(first) != _vocabulary(own)
    return None if other else first


def tokenizer_of(checkpoint: Path) -> Path | None:
    """The folder, inside of a checkpoint, of the tokenizer that the model was trained with. None
    where the checkpoint keeps none; what its run's corpus has now may be another tokenizer."""
    folder = checkpoint / FOLDER
    return folder if tokenizer_files(folder) else None


def special_tokens(folder: Path) -> dict[str, int | None]:
    """The ids ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, each of which is None where
    there is no such token."""
    settings = token_settings(folder)
    vocabulary = _vocabulary(folder)
    ids: dict[str, int | None] = {}
    for name in TOKENS:
        token = declared(settings, name.removesuffix("_id"))
        ids[name] = None if token is None else vocabulary.get(token)
    return ids


def entries(folder: Path) -> int:
    """One more than the greatest token id; 0 where the vocabulary has a format that cannot be read
    here."""
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
    parts = (read_object(folder / name) or {} for name in ("vocab.json", "added_tokens.json"))
    return {token: n for part in parts for token, n in part.items() if isinstance(n, int)}
