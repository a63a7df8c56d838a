"""Preparation that is killed: the same bits as one unbroken process leaves.

    python tools/soak_prepare.py CONFIG [key=value …] --out OUT [--shards 1 2 7] [--kills 10]

The corpus of CONFIG is prepared once without a break, and then once for each number of shards: the
shards run in a random order, and ``mprog data prepare`` is killed (SIGKILL, with all that it
started) after random times, until it has been killed so often. Then all shards run to their ends.
Every file of the prepared folder must be as in the unbroken one. Where it ended before so many
kills it begins anew. Prints a line for each number of shards; OUT keeps the logs and
soak_prepare.json. Exit code 1 where bits differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHORTEST_S = 4.0
"""Before that nothing of the preparation has begun: torch is being imported."""


def contents(folder: Path) -> dict[str, str]:
    """The checksum of each file, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def prepare(words: list[str], home: Path, seconds: float | None) -> bool:
    """Run ``mprog data prepare``; whether it ended by itself.

    Args:
        seconds: after which it is killed; None: never.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "megatron_progressive", "data", "prepare", *words,
               f"run.dir={home}"]  # fmt: skip
    with (home.parent / f"{home.name}.log").open("a") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = job.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            return False
    if code:
        raise RuntimeError(f"{' '.join(command)}: exit code {code}; see {log.name}")
    return True


def soaked(args: argparse.Namespace, count: int, home: Path, usual: float) -> dict[str, Any]:
    """Prepare in ``count`` shards, killed as often as wanted; what happened."""
    rng = random.Random(args.seed * 100 + count)
    words, kills, started = [args.config, *args.words], 0, time.perf_counter()
    left = list(range(count))
    while left:
        shard = rng.choice(left)
        limit = SHORTEST_S + rng.random() * usual / count if kills < args.kills else None
        share = ["--shard", f"{shard}/{count}"] if count > 1 else []
        if prepare([*words, *share], home, limit):
            left.remove(shard)
        else:
            kills += 1
        if not left and kills < args.kills:
            shutil.rmtree(home)
            left = list(range(count))
    return {"shards": count, "kills": kills, "seconds": time.perf_counter() - started}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 7])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    whole = args.out / "whole"
    started = time.perf_counter()
    prepare([args.config, *args.words], whole, None)
    usual = time.perf_counter() - started
    expected = contents(whole)
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    print(f"unbroken: {len(expected)} files, {size:,} bytes, {usual:.0f} s", flush=True)
    results = []
    for count in args.shards:
        home = args.out / f"shards_{count}"
        result = soaked(args, count, home, usual)
        found = contents(home)
        result |= {"files": len(found), "differ": sorted(
            name for name in {*found, *expected} if found.get(name) != expected.get(name)
        )}  # fmt: skip
        results.append(result)
        print(json.dumps(result), flush=True)
        shutil.rmtree(home)
    shutil.rmtree(whole)
    (args.out / "soak_prepare.json").write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["differ"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
