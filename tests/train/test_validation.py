"""Which samples a run validates on: as many as it is told, whatever its batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_progressive.config import RunConfig
from megatron_progressive.data import open_data
from megatron_progressive.engines.base import Engine, GlobalBatch
from megatron_progressive.runs.folder import read_metrics
from megatron_progressive.train import loop
from tests.pool import Pool
from tests.train.small_runs import run_config, train_here


def validated(config: RunConfig) -> list[list[int]]:
    """The numbers of the samples of each validation of a run, the checks at τ included."""
    make, seen = loop.make_engine, []

    def watched(*given: object) -> Engine:
        engine = make(*given)
        evaluate = engine.evaluate

        def watch(batches: Sequence[GlobalBatch]) -> float:
            seen.append([n for b in batches for n in range(b.first, b.first + b.count)])
            return evaluate(batches)

        engine.evaluate = watch
        return engine

    loop.make_engine = watched
    try:
        assert train_here(config) == 0
    finally:
        loop.make_engine = make
    return seen


WORDS = ["train.steps=4", "train.eval_every=2", "train.save_every=0", "expansion.0.at=2"]


def test_every_batch_validates_on_the_same_samples(
    pool: Pool, corpus: Path, tmp_path: Path
) -> None:
    for batch in (4, 12, 32):
        config = run_config(tmp_path, corpus, f"of{batch}", *WORDS, "train.eval_samples=18",
                            f"train.global_batch={batch}")  # fmt: skip
        first, before, after, *validations = pool.run(1, validated, config)[0]
        assert [first, *validations] == [list(range(18))] * 3  # the start, τ and the end
        assert before == after == list(range(min(batch, 18)))


def test_a_split_with_fewer_is_read_once_and_this_is_said(
    pool: Pool, corpus: Path, tmp_path: Path
) -> None:
    config = run_config(tmp_path, corpus, "few", *WORDS, "train.eval_samples=100000")
    there = open_data(config).validation_samples
    assert there is not None
    assert there % 8
    *_, validation = pool.run(1, validated, config)[0]
    assert validation == list(range(there))
    warnings = [e["message"] for e in read_metrics(config.folder) if e["event"] == "warning"]
    assert any(
        "train.eval_samples is 100,000" in text and f"has {there:,}: " in text for text in warnings
    )
