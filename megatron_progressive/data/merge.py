"""Putting the parts of a preparation together: links to their files, and a manifest."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data.manifest import (
    FORMAT,
    IN_PARTS,
    MANIFEST,
    SOURCES,
    SPLITS,
    TOKENIZER,
    Manifest,
    PartCounts,
    SplitCounts,
)
from megatron_progressive.data.megatron import indexed_dataset
from megatron_progressive.data.prepared_parts import Part, Task
from megatron_progressive.data.tally import Tally
from megatron_progressive.data.units import WHOLE_BYTES
from megatron_progressive.data.work import State, Work

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def lowest_tasks(state: State) -> list[Task]:
    """The tasks that hold out the documents with the lowest hash, where no document of several
    units was held out."""
    lowest = {task.name: parts[-1].lowest for task, parts in state.finished}
    least = min((number for number in lowest.values() if number is not None), default=None)
    return [
        Task(task.unit, task.limit, only=least)
        for task, _ in state.finished
        if lowest[task.name] == least is not None
    ]


def documents_of(state: State) -> dict[str, int]:
    """The number of documents of each split."""
    parts = [part for _, parts in state.finished for part in parts]
    return {split: sum(part.splits[split].documents for part in parts) for split in SPLITS}


def tally_of(work: Work, state: State) -> Tally:
    """What reading the whole corpus found."""
    tally = Tally()
    for _, parts in state.finished:
        tally.add(parts[-1].tally)
    tally.files_not_reached += sum(unit.whole_files for unit in state.not_reached)
    return tally


def check_splits(config: RunConfig, has_documents: dict[str, bool]) -> None:
    """Raise :class:`ConfigError` where a split has no document."""
    for split in SPLITS:
        if not has_documents[split]:
            raise ConfigError(
                f"data.validation_fraction: got {config.data.validation_fraction}, which leaves "
                f"no {split} document; accepted: a corpus of more, different documents, or "
                f"another fraction (corpus {config.data.corpus})"
            )


def put_together(work: Work, state: State, folder: Path) -> None:
    """Fill the empty ``folder`` with the prepared corpus; the manifest is written last.

    Each part's files are linked, not copied. A small corpus is one file for each split, as all
    prepared corpora of earlier versions are.
    """
    parts = [part for _, parts in state.finished for part in parts]
    shutil.copytree(work.folder / TOKENIZER, folder / TOKENIZER)
    text_bytes = sum(part.text_bytes for part in parts)
    of_split = {s: [part for part in parts if part.splits[s].documents] for s in SPLITS}
    in_one = text_bytes <= WHOLE_BYTES or all(len(mine) == 1 for mine in of_split.values())
    splits: dict[str, SplitCounts] = {}
    named: dict[str, list[PartCounts]] = {}
    for split, mine in of_split.items():
        counts = [part.splits[split] for part in mine]
        if in_one:
            sha256 = _one_file(folder, split, mine, work.context.dtype)
        else:
            names = [f"{split}-{number:06d}" for number in range(len(mine))]
            for name, part in zip(names, mine, strict=True):
                for kind in ("bin", "idx"):
                    _link(part.folder / f"{split}.{kind}", folder / f"{name}.{kind}")
            named[split] = [
                PartCounts(name, one.documents, one.tokens)
                for name, one in zip(names, counts, strict=True)
            ]
            sha256 = hashlib.sha256("".join(one.sha256 for one in counts).encode()).hexdigest()
        documents, tokens, size = (
            sum(getattr(one, name) for one in counts)
            for name in ("documents", "tokens", "text_bytes")
        )
        splits[split] = SplitCounts(documents, tokens, size, sha256)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".idx")]
    data = work.config.data
    manifest = Manifest(
        format=FORMAT if in_one else IN_PARTS,
        fingerprint=work.source["fingerprint"],
        corpus=data.corpus,
        tokenizer=data.tokenizer,
        vocab_size=work.source["entries"],
        end_of_document=work.context.end_of_document,
        dtype=work.context.dtype,
        splits=splits,
        files={path.name: path.stat().st_size for path in files},
        reading=tally_of(work, state),
        revision=work.corpus.revision,
        tokenizer_revision=work.source["tokenizer_revision"],
        parts=None if in_one else named,
    )
    if work.corpus.is_sources:
        sources = {"seen": work.source["seen"], "identity": work.source["identity"]}
        (folder / SOURCES).write_text(json.dumps(sources), encoding="utf-8")
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _one_file(folder: Path, split: str, parts: list[Part], dtype: str) -> str:
    """Make one file of the parts of a split; returns its SHA-256."""
    if len(parts) == 1:
        for kind in ("bin", "idx"):
            _link(parts[0].folder / f"{split}.{kind}", folder / f"{split}.{kind}")
        return parts[0].splits[split].sha256
    builder = indexed_dataset().IndexedDatasetBuilder(
        str(folder / f"{split}.bin"), dtype=np.dtype(dtype).type
    )
    for part in parts:
        builder.add_index(str(part.folder / split))
    builder.finalize(str(folder / f"{split}.idx"))
    with (folder / f"{split}.bin").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:  # of a file system without links
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
