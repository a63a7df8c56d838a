"""Whole jobs of several ranks on the stand-in device: how groups are made, and how ranks fail."""

from __future__ import annotations

import json
import time
from pathlib import Path

import yaml

from tests.cuda.conftest import Run
from tests.train.small_runs import run_values

RANKS = """
import os, sys
if "RANK" not in os.environ:
    from megatron_progressive.runtime.launch import run_workers
    sys.exit(run_workers([sys.executable, *sys.orig_argv[1:]], 2))
"""
GROUPS = (
    RANKS
    + """
import json
import torch.distributed as dist
from mprog_standin import native
from megatron_progressive.runtime.distributed import place_from_environment, world_group
from tests.engines.on_ranks import family_config, start, step

def live():
    return native.report()["numbers"].get("communicators_live", 0)

with world_group(place_from_environment()):
    found = [str(dist.group.WORLD.bound_device_id), live()]
    engine = start(family_config("gpt2", ["model.num_layers=1", "parallel.tensor=2"]))
    made = live()
    step(engine, 0)
    first = live()
    step(engine, 1)
    found += [made, first, live()]
    engine.close()
    found.append(live())
    if dist.get_rank() == 1:
        print(json.dumps(found))
"""
)
FAILING = (
    RANKS
    + """
from megatron_progressive.train import loop
whole = loop._Run.train_step
def train_step(self, step, stop):
    if step == 2 and os.environ["RANK"] == "1":
        raise RuntimeError("CUDA out of memory (injected)")
    return whole(self, step, stop)
loop._Run.train_step = train_step
import torch.distributed as dist
destroy = dist.destroy_process_group
def noted(*given):
    print("destroys", file=sys.stderr, flush=True)
    destroy(*given)
dist.destroy_process_group = noted
from megatron_progressive.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""
)


def test_the_world_is_bound_to_its_device_and_groups_come_when_used(on_device: Run) -> None:
    """Of some thirty groups that Megatron-core makes on each rank, and none stays."""
    done = on_device("computing", "-c", GROUPS)
    assert done.returncode == 0, done.stderr[-2000:]
    device, world, made, first, second, closed = json.loads(done.stdout.splitlines()[-1])
    assert device == "cuda:1"
    assert world == 1  # before anything is sent
    assert made <= 2  # and whatever the optimizer asks of others while it is built
    assert first == second <= 6
    assert closed == 1


def test_a_rank_that_fails_says_why_and_waits_for_nobody(
    on_device: Run, corpus: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_values(tmp_path, corpus, "failing")))
    started = time.monotonic()
    done = on_device("computing", "-c", FAILING, str(file))
    assert done.returncode == 1
    assert time.monotonic() - started < 100  # and not until a collective's time is up
    lines = done.stderr.splitlines()
    cause = next(i for i, line in enumerate(lines) if "rank 1: RuntimeError: CUDA out of" in line)
    assert "destroys" not in lines[:cause]
    assert "destroys" not in lines  # aborted: destroying may wait for others
