"""Preparing a corpus: from its text to Megatron's indexed dataset on disk, all of it or nothing."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.config.places import check_writable
from megatron_progressive.data import in_place
from megatron_progressive.data.corpus import open_corpus
from megatron_progressive.data.manifest import (
    SPLITS,
    Manifest,
    check_fit,
    check_length,
    prepared_folder,
    read_manifest,
)
from megatron_progressive.data.merge import (
    check_splits,
    documents_of,
    lowest_tasks,
    put_together,
    tally_of,
)
from megatron_progressive.data.prepared_parts import Task, do_task
from megatron_progressive.data.split import split_documents
from megatron_progressive.data.tally import Tally
from megatron_progressive.data.tokenizer import check_vocabulary, load_tokenizer, train_bpe
from megatron_progressive.data.work import Shard, State, Work, check_others, open_work, work_folder
from megatron_progressive.data.workers import run_tasks
from megatron_progressive.models import transformer_shape
from megatron_progressive.runtime.files import fsync_path, writing
from megatron_progressive.runtime.progress import ShowBytes, show_byte_stages

STALE_SECONDS = 3600.0
"""A temporary folder to which nobody has written for so many seconds was left by a killed
preparation."""

SMALL_BYTES = 2_000_000
"""Up to how many bytes a corpus is tokenized to check it exactly."""

BOUNDED_BYTES = 16_000_000
"""Up to how many bytes a local corpus is read to check it with bounds."""


def prepare(
    config: RunConfig, progress: ShowBytes | None = None, workers: int | None = None
) -> Path:
    """The folder of the prepared corpus, which is made now where it is not there yet.

    A folder that is there is used as it is. A new one appears under its name only when it is
    complete and on disk. A preparation that is killed leaves the parts that it has finished in a
    hidden folder beside it (:mod:`.work`), and a later one goes on from there. Several at once
    share their parts.

    Args:
        config: the configuration of the run.
        progress: told how far the preparation is (default: it is shown on standard error, with a
            summary at the end).
        workers: the number of processes that tokenize (default: this process alone, on as many
            threads as the tokenizer takes).

    Raises:
        ConfigError: the corpus or the tokenizer is missing or unfit, all documents are in one
            split, or the folder is there but is not a whole prepared corpus.
        ChildProcessError: a worker was killed.
        WriteFailed: the disk is full or fails.
    """
    folder = _prepared(config, progress, workers, None)
    assert folder is not None
    return folder


def prepare_shard(config: RunConfig, shard: Shard, workers: int | None = None) -> Path | None:
    """Prepare one share of a corpus, on any host that shares the folder with the others. The last
    one to finish puts all of them together.

    Args:
        config: the configuration of the run.
        shard: the share.
        workers: see :func:`prepare`.

    Returns:
        The folder of the prepared corpus; None where other shares are missing.

    Raises:
        ConfigError: see :func:`prepare`.
    """
    return _prepared(config, None, workers, shard)


def merge(config: RunConfig) -> Path:
    """The folder of the prepared corpus, put together from shares that are all finished.

    Raises:
        ConfigError: there are no shares, or some are missing, which the line names.
        WriteFailed: the disk is full or fails.
    """
    folder = prepared_folder(config)
    if _is_occupied(folder):
        read_manifest(folder)
        return folder
    check_others(config, folder)
    if not work_folder(folder).is_dir():
        raise ConfigError(
            f"--shard: got none of {folder}; accepted: shards that `mprog data prepare --shard` "
            "has finished, of the same configuration"
        )
    with writing(f"preparing {folder}"), show_byte_stages("data") as tell:
        work = open_work(config, folder, tell)
        if missing := work.state().missing:
            raise ConfigError(
                f"--shard: got {folder} without {work.missing_line(missing)}; accepted: all "
                "shards finished (run what is missing again: it goes on where it was)"
            )
        _put_together(work, folder, tell)
    return folder


def _prepared(
    config: RunConfig, progress: ShowBytes | None, workers: int | None, shard: Shard | None
) -> Path | None:
    folder = prepared_folder(config)
    if _is_occupied(folder):
        manifest = read_manifest(folder)
        check_vocabulary(
            transformer_shape(config).vocab_size, manifest.vocab_size, manifest.tokenizer
        )
        return folder
    if open_corpus(config.data).is_megatron:
        if shard is not None:
            raise ConfigError(
                f"--shard: got {shard} with data.corpus {config.data.corpus}, whose tokens stay "
                "where they are; accepted: nothing"
            )
        if workers is not None:
            _say(f"{config.data.corpus} stays where it is: one process lists it, not {workers}")
        return _prepare_in_place(config, folder, progress)
    if shard is not None:
        check_others(config, folder)
    if not work_folder(folder).is_dir():
        # before anything is written: fails fast on a tokenizer that is missing or too large
        load_tokenizer(config.data, transformer_shape(config).vocab_size)
    check_writable("run.dir" if config.data.prepared is None else "data.prepared", folder.parent)
    with writing(f"preparing {folder}"), contextlib.ExitStack() as stack:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        tell = progress or stack.enter_context(show_byte_stages("data"))
        work = open_work(config, folder, tell)
        try:
            if shard is not None:
                work.begin(shard)
            _run(work, work.tasks(shard), workers, tell)
            if missing := work.state().missing:
                assert shard is not None, missing
                what = work.missing_line(missing)
                _say(f"shard {shard} is finished; missing yet: {what}")
                return None
            _put_together(work, folder, tell)
        except FileNotFoundError:
            if not _is_occupied(folder):
                raise
            read_manifest(folder)  # another process was first, and has removed the parts
        except BaseException:
            if shard is None:
                work.remove_unless_begun()
            raise
    if progress is None:
        for line in read_manifest(folder).summary():
            _say(line)
    return folder


def _prepare_in_place(config: RunConfig, folder: Path, progress: ShowBytes | None) -> Path:
    """Prepare tokens that stay where they are; one process does that, without tokenizing."""
    check_writable("run.dir" if config.data.prepared is None else "data.prepared", folder.parent)
    with writing(f"preparing {folder}"), contextlib.ExitStack() as stack:
        in_place.open_all(config)
        in_place.tokenizer_of(config)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp"
        temporary.mkdir()
        try:
            tell = progress or stack.enter_context(show_byte_stages("data"))
            lines = in_place.fill(config, temporary, tell)
            _publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for line in lines if progress else [*lines, *read_manifest(folder).summary()]:
        _say(line)
    return folder


def _run(work: Work, tasks: Iterator[Task], workers: int | None, tell: ShowBytes) -> None:
    """Do tasks, and tell how far they are."""
    sizes = {unit.number: unit.size for unit in work.units}
    missing = {task.unit.number for task in work.state().missing}
    read = {number: sizes[number] or 0 for number in sizes.keys() - missing}
    total = work.corpus.size()
    stage = f"tokenizing {work.corpus.name}"
    done = sum(read.values())

    def told(task: Task, size: int | None) -> None:
        number = task.unit.number
        most = sizes[number]
        nonlocal done
        before = read.get(number, 0)
        # text has more bytes than its file where that is compressed
        read[number] = (
            max(before, size or 0) if most is None else (most if size is None else min(size, most))
        )
        done += read[number] - before
        tell(stage, done, total if total and done <= total else None)

    tell(stage, done, total)
    if workers is None:
        for task in tasks:
            do_task(work.context, task, functools.partial(told, task))
            told(task, None)
        return
    units = max(1, len(missing))
    run_tasks(work.context, tasks, min(workers, units), max(1, workers // units), told)


def _put_together(work: Work, folder: Path, tell: ShowBytes) -> None:
    """Make the prepared corpus of a preparation whose tasks are all finished."""
    config, state = work.config, work.state()
    if state.cut is not None:
        do_task(work.context, state.cut, lambda size: tell("cutting at data.max_bytes", size, None))
        state = work.state()
    documents = documents_of(state)
    if not any(documents.values()):
        work.remove()
        for _ in work.corpus.documents():  # says why
            break
        raise work.corpus.no_text(tally_of(work, state))
    if not documents["validation"] and len(work.units) > 1:
        again = lowest_tasks(state)
        for task in again:
            do_task(work.context, task, lambda size: tell("holding out a document", size, None))
        state = State(
            [work.finished(task, again) for task, _ in state.finished], [], state.not_reached
        )
        documents = documents_of(state)
    try:
        check_splits(config, {split: number > 0 for split, number in documents.items()})
    except ConfigError:
        work.remove()
        raise
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp"
    temporary.mkdir()
    try:
        put_together(work, state, temporary)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    work.remove()


def check(config: RunConfig) -> None:
    """Check that the corpus can be trained on, without writing anything.

    Where the corpus is prepared, the first rank says again what was left out of it. A corpus of up
    to :data:`SMALL_BYTES` that is not prepared is tokenized; of a larger one only what is certain
    from its bytes is checked here, and the rest by ``TrainingData.open``.

    Raises:
        ConfigError: the corpus or the tokenizer is missing or cannot be read, the tokenizer is
            larger than the model's vocabulary, a split is shorter than one sample, or the prepared
            corpus is not whole.
    """
    folder = prepared_folder(config)
    if config.data.prepared is not None or _is_occupied(folder):
        manifest = read_manifest(folder)
        check_fit(config, manifest)
        _recall(manifest)
        return
    shape, data = transformer_shape(config), config.data
    corpus = open_corpus(data)
    if corpus.is_megatron:
        in_place.open_all(config)
        in_place.tokenizer_of(config)
        return
    tokenizer = load_tokenizer(data, shape.vocab_size)
    kept: list[tuple[str, bool]] = []
    most = dict.fromkeys(SPLITS, 0)
    tally = Tally()
    read, read_at_most = 0, SMALL_BYTES if corpus.is_hub else BOUNDED_BYTES
    for text, held_out in split_documents(
        corpus.documents(tally), data.validation_fraction, bool(data.validation_near)
    ):
        size = len(text.encode())
        read += size
        # a token is a byte at least, but for those that some tokenizers put before a text
        most[SPLITS[held_out]] += size + 2
        if read <= SMALL_BYTES:
            kept.append((text, held_out))
        elif read > read_at_most:
            return
    check_splits(config, {split: most[split] > 0 for split in SPLITS})
    if read <= SMALL_BYTES:
        if tokenizer is None:
            sample = (text for text, held_out in kept if not held_out)
            tokenizer = train_bpe(sample, shape.vocab_size)
        for number, split in enumerate(SPLITS):
            tokens = tokenizer.encode([text for text, held_out in kept if held_out == number])
            most[split] = sum(len(document) for document in tokens)
    found = f" ({line})" if (line := tally.left_out_line()) else ""  # perhaps the cause
    for split in SPLITS:
        check_length(split, most[split], shape.sequence_length, data.corpus + found)


def _recall(manifest: Manifest) -> None:
    """Say what a preparation left out, since whoever trains on it may not have prepared it."""
    line = manifest.reading.left_out_line() if manifest.reading else ""
    if line:
        _say(f"{manifest.corpus}: {line}")


def _say(line: str) -> None:
    """Show a line about the corpus on standard error."""
    print(f"data: {line}", file=sys.stderr, flush=True)


def _is_occupied(folder: Path) -> bool:
    """Whether something is there that a rename would not replace: anything but an empty folder."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _publish(temporary: Path, folder: Path) -> None:
    """Give a complete folder its name, durably; where another folder already has it, keep that
    one."""
    for path in [*temporary.rglob("*"), temporary]:
        fsync_path(path)
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        read_manifest(folder)
        return
    fsync_path(folder.parent)


def _remove_stale(folder: Path) -> None:
    """Remove what killed preparations of ``folder`` have left; a live one writes all the time."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in [left, *left.rglob("*")])
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
