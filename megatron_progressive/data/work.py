"""A preparation that is under way: what of it is finished, and what is missing.

Its folder lies beside that of the prepared corpus, under a hidden name, and has the tokenizer,
``source.json``, which says what is prepared, and the parts that are finished
(:mod:`.prepared_parts`). Any number of processes and hosts work in it side by side; all of them
find the same units, and whoever sees that no part is missing puts them together by links.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data.corpus import Corpus, Unit, open_corpus
from megatron_progressive.data.manifest import (
    TOKENIZER,
    decides,
    fingerprint_of,
)
from megatron_progressive.data.megatron import indexed_dataset
from megatron_progressive.data.prepared_parts import (
    PART_BYTES,
    UNITS,
    Context,
    Part,
    Task,
    is_finished,
    parts_of,
)
from megatron_progressive.data.tokenizer import (
    check_vocabulary,
    load_tokenizer,
    train_bpe,
    training_sample,
)
from megatron_progressive.data.units import number_of_data_files, plan_units
from megatron_progressive.models import transformer_shape
from megatron_progressive.runtime.files import fsync_path, write_atomically
from megatron_progressive.runtime.progress import ShowBytes

SOURCE = "source.json"
SHARDS = "shards"
"""The folder with an empty file for each shard that has begun."""


@dataclass(frozen=True)
class Shard:
    """One of several shares of the units."""

    number: int
    """From 0."""
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def has(self, unit: Unit) -> bool:
        """Whether a unit is in this share."""
        return unit.number % self.count == self.number


def shard_of(text: str) -> Shard:
    """The share that ``I/N`` names.

    Raises:
        ConfigError: it names none.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise ConfigError(
            f"--shard: got {text!r}; accepted: I/N, with N shards and I from 0 to N - 1"
        )
    return Shard(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class State:
    """What of a preparation is there."""

    finished: list[tuple[Task, list[Part]]]
    """The tasks that are finished, in the order of the corpus, as far as it is certain that they
    are part of the result."""
    missing: list[Task]
    """The tasks that are not."""
    not_reached: list[Unit]
    """The units for which ``data.max_bytes`` leaves no room, once nothing is missing."""
    cut: Task | None = None
    """The task of the unit in which ``data.max_bytes`` ends, where only the whole unit is there."""


@dataclass
class Work:
    """A preparation that is under way."""

    config: RunConfig
    context: Context
    units: list[Unit]
    source: dict[str, Any]
    """What ``source.json`` says."""
    _known: dict[str, list[Part]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder that the processes share."""
        return self.context.work

    @property
    def corpus(self) -> Corpus:
        """The corpus, of the commit that all processes read."""
        return self.context.corpus

    def state(self) -> State:
        """What is finished and what is missing now.

        Where ``data.max_bytes`` cuts the corpus, what a unit gives depends on the text before it.
        As long as that is not known, it is prepared as a whole; the unit in which the cut turns out
        to be is then prepared once more.
        """
        most = self.config.data.max_bytes or None
        alone = len(self.units) == 1
        finished: list[tuple[Task, list[Part]]] = []
        missing: list[Task] = []
        left, read, is_certain = most, 0, True
        for at, unit in enumerate(self.units):
            if most is not None and read >= most:
                return State(finished, missing, [] if missing else self.units[at:])
            whole = Task(unit, most, alone=alone)
            task = replace(whole, limit=left) if is_certain else whole
            parts = self._parts(task)
            if not is_finished(parts) and is_certain and task != whole:
                parts = self._parts(whole)
                if is_finished(parts) and sum(p.text_bytes for p in parts) > (left or 0):
                    return State(finished, missing, self.units[at + 1 :], task)
                task = whole if is_finished(parts) else task
            if not is_finished(parts):
                missing.append(task)
                is_certain = False
                continue
            size = sum(part.text_bytes for part in parts)
            read += size
            left = None if left is None else left - size
            if is_certain:
                finished.append((task, parts))
        return State(finished, missing, [])

    def _parts(self, task: Task) -> list[Part]:
        if task.name not in self._known:
            parts = parts_of(self.folder, task)
            if not is_finished(parts):
                return parts
            self._known[task.name] = parts
        return self._known[task.name]

    def tasks(self, shard: Shard | None = None) -> Iterator[Task]:
        """The tasks that are missing, of one shard or of all. Each is looked for anew when it is
        asked for, since other processes work as well."""
        limited = self.config.data.max_bytes > 0
        done: set[str] = set()
        missing: list[Task] | None = None
        while True:
            if missing is None or limited:
                missing = self.state().missing
            mine = (t for t in missing if t.name not in done and (not shard or shard.has(t.unit)))
            task = next(mine, None)
            if task is None:
                return
            done.add(task.name)
            if not is_finished(self._parts(task)):
                yield task

    def finished(self, task: Task, again: list[Task]) -> tuple[Task, list[Part]]:
        """The parts of a task, or of the one of ``again`` that has its unit."""
        task = next((one for one in again if one.unit == task.unit), task)
        return task, self._parts(task)

    def begin(self, shard: Shard) -> None:
        """Leave a word that a shard has begun, so that it can be named where it is missing."""
        (self.folder / SHARDS / f"{shard.number}-of-{shard.count}").touch()

    def missing_line(self, missing: list[Task]) -> str:
        """Which shards have not done what is missing; where nobody has said that there are shards,
        how many units are missing."""
        counts = [int(path.name.partition("-of-")[2]) for path in (self.folder / SHARDS).iterdir()]
        if not counts:
            return f"{len(missing)} of {len(self.units)} units"
        count = max(counts, key=lambda one: (counts.count(one), one))
        numbers = sorted({task.unit.number % count for task in missing})
        return "shard " + ", ".join(str(Shard(number, count)) for number in numbers[:20])

    def remove(self) -> None:
        """Remove the folder; what other processes still write there is lost."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_unless_begun(self) -> None:
        """Remove the folder where nothing in it is finished and nobody writes there."""
        with contextlib.suppress(OSError):
            writes = any(self.folder.glob("part-*"))
            if not writes and not any((self.folder / UNITS).glob("*/*")):
                self.remove()


def work_folder(folder: Path) -> Path:
    """The folder of the preparation under way of the prepared corpus ``folder``."""
    return folder.parent / f".{folder.name}.parts"


def open_work(config: RunConfig, folder: Path, tell: ShowBytes) -> Work:
    """The preparation of ``folder`` that is under way, or a new one.

    Args:
        config: the configuration of the run.
        folder: the folder of the prepared corpus.
        tell: told that a tokenizer is trained, where that is so.

    Raises:
        ConfigError: the corpus or the tokenizer is missing or unfit, or what is under way is of
            another configuration.
    """
    work = work_folder(folder)
    if not (work / SOURCE).is_file():
        _begin(config, work, tell)
    values = _source(work)
    mine = decides(config)
    if fingerprint_of(mine) != values["fingerprint"]:
        raise _of_another(f"data.prepared: got {folder}", work, mine, values)
    check_vocabulary(transformer_shape(config).vocab_size, values["entries"], config.data.tokenizer)
    corpus = replace(open_corpus(config.data), revision=values["revision"])
    context = Context(
        corpus,
        work,
        values["end_of_document"],
        indexed_dataset().DType.optimal_dtype(values["entries"]).__name__,
        config.data.validation_fraction,
        bool(config.data.validation_near),
        PART_BYTES,
    )
    return Work(config, context, plan_units(corpus, values["data_files"]), values)


def check_others(config: RunConfig, folder: Path) -> None:
    """Raise :class:`ConfigError` where shards of another configuration are under way: of one
    array, they would never be put together.

    Args:
        config: the configuration of this shard.
        folder: the folder of its prepared corpus.
    """
    work = work_folder(folder)
    if config.data.prepared is not None or work.is_dir():
        return
    name = glob.escape(open_corpus(config.data).name)
    for other in sorted(folder.parent.glob(f".{name}-*.parts")):
        if (other / SOURCE).is_file() and any((other / SHARDS).iterdir()):
            got = f"--shard: got one of {folder}"
            raise _of_another(got, other, decides(config), _source(other))


def _of_another(got: str, work: Path, mine: dict[str, Any], values: dict[str, Any]) -> ConfigError:
    theirs = values["decides"]
    differing = [
        f"data.{key}" for key in {**mine, **theirs} if _digest(mine.get(key)) != theirs.get(key)
    ]
    return ConfigError(
        f"{got}, while {work} has parts of another configuration ({', '.join(differing)}); "
        "accepted: the configuration that they are of (delete them to begin anew)"
    )


def _source(work: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((work / SOURCE).read_text(encoding="utf-8"))
    return values


def _begin(config: RunConfig, work: Path, tell: ShowBytes) -> None:
    """Make the folder of a preparation; of several at once the first one stays."""
    corpus = open_corpus(config.data).pinned()  # read twice: for the tokenizer, for its tokens
    # before reading: files that change meanwhile make a new one
    seen = corpus.seen() if corpus.is_sources else None
    mine = decides(config)
    vocab_size = transformer_shape(config).vocab_size
    tokenizer = load_tokenizer(config.data, vocab_size)
    hub_files = number_of_data_files(corpus)
    if tokenizer is None:
        tell(f"training a tokenizer on {corpus.name}", 0, None)
        sample = training_sample(
            corpus, config.data.validation_fraction, bool(config.data.validation_near)
        )
        tokenizer = train_bpe(sample, vocab_size)
    temporary = work.with_name(f"{work.name}.{uuid.uuid4().hex[:12]}.tmp")
    temporary.mkdir(parents=True)
    try:
        tokenizer.save(temporary / TOKENIZER)
        for name in (UNITS, SHARDS):
            (temporary / name).mkdir()
        values = {
            "fingerprint": fingerprint_of(mine),
            "decides": {key: _digest(value) for key, value in mine.items()},
            "revision": corpus.revision,
            "data_files": hub_files,
            "entries": tokenizer.entries,
            "end_of_document": tokenizer.end_of_document,
            "tokenizer_revision": tokenizer.revision,
            **({"seen": seen, "identity": mine["corpus"]} if seen else {}),
        }
        write_atomically(temporary / SOURCE, json.dumps(values))
        for path in [*temporary.rglob("*"), temporary]:
            fsync_path(path)
        try:
            os.rename(temporary, work)
        except OSError:
            if not (work / SOURCE).is_file():
                raise
        fsync_path(work.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(value: Any) -> str | None:
    """A hash of a value; None where there is none."""
    if value is None:
        return None
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
