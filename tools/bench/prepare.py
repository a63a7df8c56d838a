"""Tokens per second and core of ``mprog data prepare`` against the tokenizer alone.

The documents of WikiText and of books are read, split, tokenized and written as a preparation does
it, unit by unit; right before or after each unit, in turn, the same documents go through bare
``encode_batch_fast``, whose result is thrown away. Both have one thread, and are compared by the
CPU time of this process, which other work on the machine disturbs less than the time of day. Then
one worker and several prepare the same units, by the time of day from the first task to the last
(their start, some seconds, is left out).

    python tools/bench/prepare.py DATA --megabytes 24 --workers 2

DATA is a folder with ``gpt2_vocab.json`` and ``gpt2_merges.txt`` (or any tokenizer that
``data.tokenizer`` takes) and the texts: files ``.txt``, ``.jsonl`` or ``.jsonl.xz``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # before the tokenizer is first used
os.environ["TOKENIZERS_PARALLELISM"] = "false"

UNIT_BYTES = 1 << 20
"""Units are smaller than those of a preparation, whose own cost for each unit weighs more here."""


def texts_of(data: Path) -> Iterator[Iterator[str]]:
    """The documents of each file."""
    from megatron_progressive.config import DataSection
    from megatron_progressive.data.corpus import open_corpus

    for file in sorted(data.iterdir()):
        if file.name.endswith((".txt", ".jsonl", ".jsonl.xz")) and "merges" not in file.name:
            yield open_corpus(DataSection(corpus=str(file))).documents()


def write_corpus(data: Path, corpus: Path, megabytes: float) -> None:
    """Write the documents to JSON lines, alternately of each file, a file for each unit."""
    corpus.mkdir()
    left, number, size, lines = megabytes * 1e6, 0, 0, list[str]()
    missing = object()
    for text in itertools.chain.from_iterable(
        itertools.zip_longest(*texts_of(data), fillvalue=missing)
    ):
        if not isinstance(text, str):
            continue
        for start in range(0, len(text), 200_000):  # books, in chapters
            piece = text[start : start + 200_000]
            lines.append(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
            size += len(piece.encode())
        if size >= UNIT_BYTES:
            (corpus / f"{number:05d}.jsonl").write_text("".join(lines), encoding="utf-8")
            number, left, size, lines = number + 1, left - size, 0, []
        if left <= 0:
            return


def prepared(values: dict[str, Any], folder: Path) -> Any:
    """A preparation that has begun, in a folder of its own."""
    from megatron_progressive.config import from_dict
    from megatron_progressive.data.work import open_work

    config = from_dict({**values, "run": {"dir": str(folder)}})
    return open_work(config, folder / "prepared", lambda *_: None)


def cpu_of(act: Callable[[], Any]) -> tuple[float, Any]:
    """The CPU seconds of this process, and the result."""
    start = time.process_time()
    result = act()
    return time.process_time() - start, result


def against_bare(work: Any) -> float:
    """Print tokens per CPU second of both, and the median ratio over the units; returns tokens per
    second of the preparation."""
    from tokenizers import Tokenizer

    from megatron_progressive.data.corpus import Reading
    from megatron_progressive.data.prepared_parts import do_task, parts_of
    from megatron_progressive.data.tally import Tally

    backend = Tokenizer.from_file(str(work.folder / "tokenizer" / "tokenizer.json"))
    bare = own = 0.0
    tokens = 0
    ratios = []
    for number, task in enumerate(work.tasks()):
        texts = [text for text, _ in Reading(work.corpus, task.unit, Tally()).documents()]

        def tokenize(texts: list[str] = texts) -> None:
            backend.encode_batch_fast(texts, add_special_tokens=False)

        def do(task: Any = task) -> None:
            do_task(work.context, task, lambda size: None)

        taken = {}
        for name, act in sorted({"bare": tokenize, "own": do}.items(), reverse=bool(number % 2)):
            taken[name] = cpu_of(act)[0]
        if number < 2:  # caches are filled
            continue
        bare, own = bare + taken["bare"], own + taken["own"]
        ratios.append(taken["bare"] / taken["own"])
        parts = parts_of(work.folder, task)
        tokens += sum(counts.tokens for part in parts for counts in part.splits.values())
    print(
        f"{tokens:,} tokens in {len(ratios)} units: bare {tokens / bare:,.0f}, prepare "
        f"{tokens / own:,.0f} tokens per CPU second; ratio {bare / own:.3f}, median of units "
        f"{statistics.median(ratios):.3f}"
    )
    return tokens / own


def with_workers(work: Any, workers: int) -> float:
    """The seconds of the day that a task takes, from the first to the last."""
    from megatron_progressive.data.workers import run_tasks

    tasks = list(work.tasks())
    done: list[float] = []
    run_tasks(
        work.context, iter(tasks), workers, 1,
        lambda task, size: done.append(time.monotonic()) if size is None else None,
    )  # fmt: skip
    # the first task of each worker has its start in it
    return (done[-1] - done[workers - 1]) / (len(tasks) - workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="default: DATA")
    parser.add_argument("--megabytes", type=float, default=24.0, help="of text (default: 24)")
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    parser.add_argument("--bare-only", action="store_true", help="leave out the workers")
    args = parser.parse_args()
    from megatron_progressive.data import units

    units.WHOLE_BYTES = units.UNIT_BYTES = UNIT_BYTES // 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(args.data, folder / "corpus", args.megabytes)
        values = {
            "model": {"family": "gpt2"},
            "data": {
                "corpus": str(folder / "corpus"), "vocab_size": 50304,
                "tokenizer": str(args.tokenizer or args.data),
            },
        }  # fmt: skip
        for name in ("bare", "one", "several"):
            (folder / name).mkdir()
        rate = against_bare(prepared(values, folder / "bare"))
        print(f"100B tokens on 64 such cores: {100e9 / rate / 64 / 3600:.1f} hours")
        if args.bare_only:
            return
        one = with_workers(prepared(values, folder / "one"), 1)
        more = with_workers(prepared(values, folder / "several"), args.workers)
        print(f"{args.workers} workers: {one / more:.2f} times the rate of one")


if __name__ == "__main__":
    main()
