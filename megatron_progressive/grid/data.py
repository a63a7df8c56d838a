"""What a study's cells are trained on: one prepared corpus for all cells that ask for the same one.

The first run of a study settles this in the study's folder ``data/``, with one file for each
``data`` section of its cells (sizes may change that section). From then on every cell is trained on
that corpus, however often the study is taken up again.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_progressive import data
from megatron_progressive.checkpoints.init_from import with_initial_tokenizer
from megatron_progressive.config import CONFIG_FILE, ConfigError, RunConfig
from megatron_progressive.data import Begun, DataIdentity, read_identity
from megatron_progressive.models import model_shape
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.runtime.files import fsync_path, write_json
from megatron_progressive.runtime.progress import Say

_NOT_CONTENT = ("prepared", "sequence_length", "attention")  # of the data section
_ADDED = ("mix", "validation", "validation_near")
"""Keys that were added later: they count only where they have a value."""


def data_key(config: RunConfig) -> str:
    """Twelve hexadecimal digits of everything that asks for a corpus: equal for configurations that
    one prepared corpus serves."""
    asked = _asked(asdict(config.data))
    shape = model_shape(config)
    if isinstance(shape, TransformerShape):
        asked["vocab_size"] = shape.vocab_size if config.data.tokenizer == "bpe" else None
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def _asked(values: Any) -> Any:
    if isinstance(values, dict):
        return {
            key: _asked(value)
            for key, value in values.items()
            if key not in _NOT_CONTENT and (value is not None or key not in _ADDED)
        }
    return [_asked(value) for value in values] if isinstance(values, list) else values


class StudyData:
    """The settled data of a study's folder."""

    def __init__(self, folder: Path) -> None:
        self._study, self._folder = folder, folder / "data"

    def known(self, config: RunConfig) -> DataIdentity | None:
        """What the cells of this ``data`` section are trained on; None where none has begun since
        this is recorded."""
        if not self._folder.is_dir():
            return None
        return read_identity(self._file(config))

    def settle(self, config: RunConfig, begun: Sequence[Path], say: Say) -> DataIdentity:
        """What the cells of this ``data`` section are trained on, prepared and whole.

        Args:
            begun: the run folders of cells that began before this was recorded.

        Raises:
            ConfigError: the data is not there, or is not what cells have been trained on.
        """
        known = self.known(config)
        what = f"study {self._study}"
        before: Begun | None = None
        if known is not None or begun:
            at = min(((f / CONFIG_FILE).stat().st_mtime for f in begun), default=0.0)
            before = Begun(what, "a new study.name", known, at)
        asked = with_initial_tokenizer(config)  # as a cell's own start would
        found, notes = data.settle(asked, before)
        if known is not None and found.all_folders != known.all_folders:  # the same, elsewhere
            write_json(self._file(config), found.to_values())
        elif known is None:
            mine, found = found, self._record(config, found)
            if data.differ(mine, found):  # another worker was first, on what was there before
                found, notes = data.settle(asked, Begun(what, "a new study.name", found))
        for note in notes:
            say(note)
        return found

    def _file(self, config: RunConfig) -> Path:
        return self._folder / f"{data_key(config)}.json"

    def _record(self, config: RunConfig, found: DataIdentity) -> DataIdentity:
        """Record the data where no other worker has done so; returns what is recorded then."""
        file = self._file(config)
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}.tmp")
        temporary.write_text(json.dumps(found.to_values(), indent=2) + "\n", encoding="utf-8")
        fsync_path(temporary)
        try:
            os.link(temporary, file)  # unlike a rename, of several at once the first one stays
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        fsync_path(self._folder)
        recorded = read_identity(file)
        if recorded is None:
            raise ConfigError(
                f"study: {file} cannot be read; accepted: what mprog wrote there (delete it to "
                "settle anew what the study is trained on)"
            )
        return recorded
