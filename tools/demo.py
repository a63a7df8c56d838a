"""``make demo``: four arms on real text, one report.

Trains a progressive run and its controls one after the other on two local ranks, then compares
them: fixed-size, and for the progressive run's FLOPs the target depth from scratch (short control)
and the source depth alone (never grown). Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_progressive.config import load
from megatron_progressive.cost.flops import total_flops
from megatron_progressive.plan.controls import all_controls, control_words

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/demo.yaml"
RANKS = 2


def mprog(*words: str) -> None:
    """Run a command of ``mprog``; end with its exit code if it fails."""
    command = [sys.executable, "-m", "megatron_progressive", *words]
    print("\n$ mprog " + " ".join(words), flush=True)
    # one thread a rank: two ranks share two cores
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    started = time.monotonic()
    progressive = load(ROOT / CONFIG)
    arms = [progressive, *all_controls(progressive)]
    flops = ", ".join(f"{arm.run.name} {total_flops(arm) / 1e12:.1f}" for arm in arms)
    print(f"{len(arms)} runs, one after the other (TFLOP: {flops}). About 12 minutes on two cores.")
    for arm in arms:
        words = [] if arm is progressive else control_words(progressive, arm)
        mprog("train", CONFIG, *words, "--nproc", str(RANKS))
    folders = [str(arm.folder) for arm in arms]
    mprog("report", *folders, "--out", str(Path(progressive.run.dir) / "demo_report"))
    print(f"\nDemo done in {(time.monotonic() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
