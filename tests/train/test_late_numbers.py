"""Numbers that come late, as a device's do: the loop launches the next step before it reads them,
and records the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import pytest

from megatron_progressive.config import RunConfig
from megatron_progressive.engines.megatron.engine import MegatronEngine
from megatron_progressive.engines.step_metrics import PendingSums, StepMetrics
from megatron_progressive.runs.folder import read_metrics
from tests.pool import Pool
from tests.train.small_runs import run_config, train_here

UNTIMED = ("event", "step", "loss", "grad_norm", "lr", "flops", "tokens", "num_layers",
           "loss_before", "loss_after")  # fmt: skip
WORDS = ["train.steps=20", "train.eval_every=8", "train.save_every=5", "expansion.0.at=10"]


def train_late(config: RunConfig, signalled_at: int) -> tuple[int, list[str]]:
    """Train here with late numbers, and a signal while a step is launched; the exit code, and in
    which order steps were launched and their numbers read."""
    order = list[str]()
    launch, read = MegatronEngine.train_step, PendingSums.found.func

    def launching(self: MegatronEngine, *arguments: object) -> StepMetrics:
        step = sum(one.startswith("launch") for one in order) + 1
        metrics: StepMetrics = launch(self, *arguments)  # type: ignore[arg-type]
        metrics._sums.__dict__["step"] = step
        order.append(f"launch {step}")
        if step == signalled_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    def reading(self: PendingSums) -> object:
        if "step" in self.__dict__:  # and not a validation's
            order.append(f"read {self.__dict__['step']}")
        self.__dict__["found"] = read(self)  # as the cached property does
        return self.__dict__["found"]

    class Found:
        def __get__(self, sums: PendingSums, owner: type) -> object:
            return sums.__dict__["found"] if "found" in sums.__dict__ else reading(sums)

    with (
        mock.patch.object(MegatronEngine, "train_step", launching),
        mock.patch.object(StepMetrics, "late", True),
        mock.patch.object(PendingSums, "found", Found()),
    ):
        code = train_here(config)
    return code, order


def recorded(folder: Path) -> list[dict[str, object]]:
    return [{k: e[k] for k in UNTIMED if k in e} for e in read_metrics(folder)]


@pytest.mark.parametrize("world", [1, 2])
def test_the_same_is_recorded(pool: Pool, corpus: Path, tmp_path: Path, world: int) -> None:
    usual = run_config(tmp_path, corpus, "usual", *WORDS)
    pool.run(world, train_here, usual)
    late = run_config(tmp_path, corpus, "late", *WORDS)
    for code, order in pool.run(world, train_late, late, 0):
        assert code == 0
        # step 6 is launched before step 5's numbers are read, but where a save (5, 10, 15, 20), a
        # validation (8, 16) or τ (10) follows they are read at once
        assert order[:6] == ["launch 1", "launch 2", "read 1", "launch 3", "read 2", "launch 4"]
        for step in range(1, 20):
            waits = step in (5, 8, 10, 15, 16)
            assert (order.index(f"read {step}") < order.index(f"launch {step + 1}")) == waits
        assert len(order) == 40
    assert recorded(late.folder) == recorded(usual.folder)


def test_a_signal_stops_it_a_step_later(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """All ranks after the same one, which is saved; resumed it is the same run."""
    usual = run_config(tmp_path, corpus, "usual", *WORDS)
    pool.run(2, train_here, usual)
    late = run_config(tmp_path, corpus, "late", *WORDS)
    for code, order in pool.run(2, train_late, late, 11):
        assert code == 75
        assert order[-2:] == ["read 12", "read 13"]  # 12 took the wish with it, 13 was under way
    assert pool.run(2, train_here, late) == [0, 0]
    steps = [e for e in recorded(late.folder) if e["event"] == "train"]
    assert steps == [e for e in recorded(usual.folder) if e["event"] == "train"]
