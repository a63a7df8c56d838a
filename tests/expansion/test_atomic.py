"""Failures and kills inside the expansion: real processes, real signals."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive.checkpoints.checkpoint import checkpoints
from megatron_progressive.config import to_yaml
from megatron_progressive.runs.folder import read_metrics
from tests.jobs import Jobs
from tests.train.small_runs import run_config

WORDS = ["train.steps=9", "train.save_every=3", "train.eval_every=3", "train.micro_batch=2",
         "train.keep_checkpoints=1", "optim.name=adamw", "optim.lr=0.003",
         "model.hidden_size=160"]  # fmt: skip
EXPANSION = [{"at": 6, "to_layers": 4, "init": "copying", "optimizer_state": "copy",
              "parallel": {"tensor": 2, "staging_mib": 1}}]  # fmt: skip

MOMENTS = ("build", "fill", "metadata", "exchange", "second exchange", "loaded", "agreed",
           "closing", "activated")  # fmt: skip


def at_moment(moment: str, act: Callable[[], None]) -> None:
    """Call ``act`` when this process reaches a moment of the expansion."""
    from megatron_progressive.engines.megatron.engine import MegatronEngine
    from megatron_progressive.expansion import hook
    from megatron_progressive.reshard import transfer

    engines: list[Any] = []

    def before(owner: Any, name: str, condition: Callable[[], bool] = lambda: True) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if condition():
                act()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    construct = MegatronEngine.__init__

    def constructed(self: Any, *args: Any) -> None:
        if engines and moment == "build":
            act()
        engines.append(self)
        construct(self, *args)

    MegatronEngine.__init__ = constructed  # type: ignore[method-assign]
    if moment == "fill":
        before(hook, "apply_rules")
    elif moment == "metadata":
        before(transfer, "gather_metadata")
    elif moment == "exchange":
        before(transfer, "_exchange")
    elif moment == "second exchange":  # the weights of the old engine are gone
        calls: list[None] = []
        before(transfer, "_exchange", lambda: calls.append(None) or len(calls) == 2)  # type: ignore[func-returns-value]
    elif moment == "loaded":
        before(MegatronEngine, "loaded", lambda: len(engines) == 2)
    elif moment == "agreed":
        before(hook, "ExpansionEvent")
    elif moment == "closing":
        before(MegatronEngine, "close")
    elif moment == "activated":
        before(MegatronEngine, "activate", lambda: len(engines) == 2)


def kill_at(victim: int, moment: str) -> None:
    if int(os.environ["RANK"]) == victim:
        at_moment(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))


def kill_after(victim: int, seconds: float) -> None:
    """SIGKILL so long after the expansion began."""
    from megatron_progressive.train import loop

    expand = loop.expand

    def timed(*args: Any) -> Any:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        return expand(*args)

    if int(os.environ["RANK"]) == victim:
        loop.expand = timed


def fail_at(victim: int, moment: str) -> None:
    def fail() -> None:
        raise OSError("cannot allocate 7 GiB")

    if int(os.environ["RANK"]) == victim:
        at_moment(moment, fail)


def fail_and_stay(victim: int, moment: str) -> None:
    """A failed rank whose process, and so its connections, live on."""

    def fail() -> None:
        try:
            raise OSError("cannot allocate 7 GiB")
        finally:
            threading.Thread(target=time.sleep, args=(600,)).start()

    from megatron_progressive.runtime import agreement

    agreement.GRACE_SECONDS = 1.0
    if int(os.environ["RANK"]) == victim:
        import torch.distributed as dist

        dist.destroy_process_group = lambda *_: time.sleep(5)
        at_moment(moment, fail)


Trajectory = list[tuple[Any, ...]]


def trajectory(folder: Path) -> Trajectory:
    """All numbers of a run that a resumed one must repeat."""
    keys = ("event", "step", "loss", "grad_norm", "num_layers", "loss_before", "loss_after")
    events = [e for e in read_metrics(folder) if e["event"] in ("train", "eval", "expansion")]
    return [tuple(e.get(k) for k in keys) for e in events]


@pytest.fixture(scope="module")
def unbroken(jobs: Jobs, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with the checkpoint made right before its expansion."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = run_config(folder, corpus, "run", *WORDS, expansion=EXPANSION)
    (folder / "in.yaml").write_text(to_yaml(config))
    job = jobs.run(2, folder, ["train", str(folder / "in.yaml")])
    assert job.codes == [0, 0], job.output
    steps = [path.name for path in checkpoints(config.folder)]
    assert steps == ["step_0000006", "step_0000009"]  # the one before τ is kept
    return folder


def at_tau(unbroken: Path, corpus: Path, folder: Path) -> list[str]:
    """A copy of the run as it was when the expansion began; the words that go on with it."""
    config = run_config(folder, corpus, "run", *WORDS, expansion=EXPANSION)
    (folder / "in.yaml").write_text(to_yaml(config))
    shutil.copytree(unbroken / "run", config.folder)
    shutil.rmtree(config.folder / "checkpoints" / "step_0000009")
    (config.folder / "summary.json").unlink()
    (config.folder / "config.yaml").write_text(to_yaml(config))
    return ["train", str(folder / "in.yaml")]


@pytest.mark.parametrize("number", range(30))
def test_killed_in_the_expansion_and_started_again(
    jobs: Jobs, unbroken: Path, corpus: Path, tmp_path: Path, number: int
) -> None:
    rng = random.Random(number)
    victim, words = rng.randrange(2), at_tau(unbroken, corpus, tmp_path)
    (event,) = (e for e in read_metrics(unbroken / "run") if e["event"] == "expansion")
    if number < 2 * len(MOMENTS):
        kill: tuple[Any, ...] = ("kill_at", (number % 2, MOMENTS[number // 2]))
    else:
        kill = ("kill_after", (victim, rng.uniform(0, event["seconds"])))
    job = jobs.run(2, tmp_path, words, (__name__, *kill))
    assert job.codes[kill[1][0]] == -signal.SIGKILL, kill  # of the launcher's doing the other's
    assert 0 not in job.codes
    assert jobs.run(2, tmp_path, words).codes == [0, 0]
    assert trajectory(tmp_path / "run") == trajectory(unbroken / "run"), kill


@pytest.mark.parametrize("moment", ["build", "fill", "exchange", "loaded"])
def test_a_failing_rank_stops_all_with_its_error(
    jobs: Jobs, unbroken: Path, corpus: Path, tmp_path: Path, moment: str
) -> None:
    words = at_tau(unbroken, corpus, tmp_path)
    job = jobs.run(2, tmp_path, words, (__name__, "fail_at", (1, moment)))
    assert job.codes == [1, 1]
    assert job.hung == []
    cause = "rank 1: OSError: cannot allocate 7 GiB"
    assert job.output[1].splitlines()[-1] == cause
    assert job.output[0].splitlines()[-1] == f"rank 0: RankFailed: {cause}"
    assert jobs.run(2, tmp_path, words).codes == [0, 0]
    assert trajectory(tmp_path / "run") == trajectory(unbroken / "run")


def test_a_rank_that_waits_for_a_failed_one_is_ended(
    jobs: Jobs, unbroken: Path, corpus: Path, tmp_path: Path
) -> None:
    """As with NCCL, where the others' wait does not end by itself."""
    words = at_tau(unbroken, corpus, tmp_path)
    job = jobs.run(2, tmp_path, words, (__name__, "fail_and_stay", (1, "fill")))
    assert job.codes == [1, 1]
    assert job.hung == []
    assert (
        job.output[0].splitlines()[-1]
        == "rank 0: RankFailed: rank 1: OSError: cannot allocate 7 GiB"
    )
