"""Parts of a preparation: tokens of consecutive documents of one unit, complete on disk or not
there.

A part is a folder with ``train.bin/.idx`` and ``validation.bin/.idx`` (Megatron's indexed dataset;
a split without documents has no files) and ``part.json``. It gets its name when it is complete, so
that a preparation that is killed goes on after the parts that are there. Parts are cut where their
text reaches :data:`PART_BYTES`: where and by how many processes they are made does not matter.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_progressive.data.corpus import Corpus, Reading, Unit
from megatron_progressive.data.manifest import SPLITS, TOKENIZER, SplitCounts
from megatron_progressive.data.megatron import indexed_dataset
from megatron_progressive.data.split import Splitter
from megatron_progressive.data.tally import Tally
from megatron_progressive.data.tokenizer import DocumentTokenizer
from megatron_progressive.runtime.files import fsync_path

if TYPE_CHECKING:
    import numpy as np

BATCH_BYTES = 1 << 20
"""How many bytes of text are tokenized at once."""

PART_BYTES = 256 << 20
"""At how many bytes of text a part ends. A unit that was not finished loses no more than that."""

RECORD = "part.json"
UNITS = "units"
"""The folder of all parts in the folder of a preparation that is under way."""

Advance = Callable[[int], None]
"""Called with the bytes of text of a unit that have been read so far."""


@dataclass(frozen=True)
class Task:
    """What is to be made of one unit."""

    unit: Unit
    limit: int | None = None
    """The most bytes of text; None takes all."""
    only: int | None = None
    """The hash of the documents to hold out, where the corpus has none that is low enough."""
    alone: bool = False
    """Whether it is the only unit of the corpus."""

    @property
    def name(self) -> str:
        """The name of the folder of its parts."""
        limit = "" if self.limit is None else f".first-{self.limit}"
        only = "" if self.only is None else f".only-{self.only:016x}"
        return f"{self.unit.number:06d}{limit}{only}"


@dataclass(frozen=True)
class Part:
    """A part that is complete."""

    folder: Path
    splits: dict[str, SplitCounts]
    lowest: int | None
    """The lowest hash of its documents, and of those before it in its unit."""
    tally: Tally
    """What reading its unit found up to its end."""
    position: dict[str, Any] | None
    """Where its unit goes on; None where it is the last part."""

    @property
    def text_bytes(self) -> int:
        """The bytes of text of both splits."""
        return sum(counts.text_bytes for counts in self.splits.values())


@dataclass(frozen=True)
class Context:
    """What all tasks of a preparation share. It can be sent to another process."""

    corpus: Corpus
    work: Path
    """The folder of the preparation under way, with the tokenizer."""
    end_of_document: int
    dtype: str
    """NumPy's name of the type of a token on disk."""
    fraction: float
    near: bool
    part_bytes: int
    """At how many bytes of text a part ends."""


def parts_of(work: Path, task: Task) -> list[Part]:
    """The parts of a task that are complete, in order."""
    parts: list[Part] = []
    while True:
        folder = work / UNITS / task.name / f"{len(parts):04d}"
        try:
            values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return parts
        splits = {split: SplitCounts(**values["splits"][split]) for split in SPLITS}
        tally = Tally.from_json(values["tally"])
        parts.append(Part(folder, splits, values["lowest"], tally, values["position"]))
        if parts[-1].position is None:
            return parts


def is_finished(parts: list[Part]) -> bool:
    """Whether these are all parts of their unit."""
    return bool(parts) and parts[-1].position is None


@functools.lru_cache(maxsize=1)
def _tokenizer(work: Path, end_of_document: int) -> DocumentTokenizer:
    from tokenizers import Tokenizer

    file = work / TOKENIZER / "tokenizer.json"
    return DocumentTokenizer(str(file), Tokenizer.from_file(str(file)), end_of_document)


def do_task(context: Context, task: Task, advance: Advance) -> None:
    """Make the parts of a task that are not there yet.

    Raises:
        ConfigError: the corpus cannot be read (see :meth:`.Corpus.documents`; a unit may have no
            text).
        FileNotFoundError: the folder of the preparation has gone: another process has finished it.
    """
    parts = parts_of(context.work, task)
    if is_finished(parts):
        return
    position = parts[-1].position if parts else None
    # a stream of the hub goes on where it was, while files are counted again from their start
    tally = parts[-1].tally if parts and context.corpus.is_hub else Tally()
    reading = Reading(context.corpus, task.unit, tally, task.limit, position, patient=True)
    splitter = Splitter(
        context.fraction,
        context.near,
        begun=bool(parts) or not task.alone,
        alone=task.alone,
        only=task.only,
    )
    splitter.lowest = parts[-1].lowest if parts else None
    tokenizer = _tokenizer(context.work, context.end_of_document)
    (context.work / UNITS / task.name).mkdir(parents=True, exist_ok=True)
    documents = splitter.split(reading.documents())
    last = False
    while not last:
        folder = context.work / UNITS / task.name / f"{len(parts):04d}"
        temporary = context.work / f"part-{uuid.uuid4().hex}"
        temporary.mkdir()
        try:
            files = {split: _SplitFile(temporary, split, context.dtype) for split in SPLITS}
            last = _fill(
                files, documents, tokenizer, splitter, reading, context.part_bytes, advance
            )
            values = {
                "splits": {split: asdict(file.finish()) for split, file in files.items()},
                "lowest": splitter.lowest,
                "tally": tally.to_json(),
                "position": None if last else reading.position(),
            }
            (temporary / RECORD).write_text(json.dumps(values), encoding="utf-8")
            _publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        parts = parts_of(context.work, task)


def _fill(
    files: dict[str, _SplitFile],
    documents: Any,
    tokenizer: DocumentTokenizer,
    splitter: Splitter,
    reading: Reading,
    part_bytes: int,
    advance: Advance,
) -> bool:
    """Write the tokens of documents until the part is full; returns whether none is left."""
    batch: list[tuple[str, int, bool]] = []
    in_part = in_batch = 0

    def flush() -> None:
        nonlocal in_batch
        rows = tokenizer.encode([text for text, _, _ in batch])
        for number, split in enumerate(SPLITS):
            mine = [n for n, (_, _, held_out) in enumerate(batch) if held_out == number]
            files[split].add([rows[n] for n in mine], sum(batch[n][1] for n in mine))
        batch.clear()
        in_batch = 0
        advance(reading.bytes)

    for document in documents:
        batch.append(document)
        in_batch += document[1]
        in_part += document[1]
        is_full = in_part >= part_bytes and not splitter.waiting
        if is_full or in_batch >= BATCH_BYTES:
            flush()
        if is_full:
            return False
    flush()
    return True


class _SplitFile:
    """The ``.bin`` and ``.idx`` files of one split of a part."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        import numpy as np

        self._prefix, self._dtype = str(folder / split), np.dtype(dtype)
        self._builder = indexed_dataset().IndexedDatasetBuilder(
            f"{self._prefix}.bin", dtype=self._dtype.type
        )
        self._sha256 = hashlib.sha256()
        self._tokens = self._text_bytes = 0

    def add(self, rows: list[np.ndarray], text_bytes: int) -> None:
        """Add documents. The builder's own ``add_document`` copies each one several times."""
        import numpy as np

        if not rows:
            return
        content = np.concatenate(rows).astype(self._dtype, copy=False)
        self._builder.data_file.write(content.data)
        self._sha256.update(content.data)
        before = len(self._builder.sequence_lengths)
        self._builder.sequence_lengths.extend(map(len, rows))
        self._builder.document_indices.extend(range(before + 1, before + len(rows) + 1))
        self._tokens += len(content)
        self._text_bytes += text_bytes

    def finish(self) -> SplitCounts:
        """Complete the files, and remove them where there are no documents."""
        documents = len(self._builder.sequence_lengths)
        if documents:
            self._builder.finalize(f"{self._prefix}.idx")
        else:
            self._builder.data_file.close()
            os.unlink(f"{self._prefix}.bin")
        return SplitCounts(documents, self._tokens, self._text_bytes, self._sha256.hexdigest())


def _publish(temporary: Path, folder: Path) -> None:
    """Give a complete part its name, durably; where another process was first, keep its part, which
    has the same bytes."""
    for path in [*temporary.iterdir(), temporary]:
        fsync_path(path)
    try:
        os.rename(temporary, folder)
    except OSError:
        if not (folder / RECORD).is_file():
            raise
    fsync_path(folder.parent)
