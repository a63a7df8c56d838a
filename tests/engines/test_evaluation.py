"""Validation is of exactly the samples that are asked for, whatever batch and layout."""

from __future__ import annotations

import random
from typing import Any

import pytest

from megatron_progressive.config import RunConfig
from megatron_progressive.data import open_data
from megatron_progressive.engines.base import GlobalBatch, in_batches, mean_over
from tests.engines import on_ranks, resnet_on_ranks
from tests.pool import Pool

COUNTS = (1, 3, 8, 11, 16)  # of batches of 8: less than one, whole ones, and a part behind them
TP, PP, EP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"
VPP, DEEPSPEED = "parallel.virtual_pipeline=2", "parallel.engine=deepspeed"


def test_every_sample_counts_once_and_ranks_have_as_many_micro_batches() -> None:
    rng = random.Random(5)
    for _ in range(300):
        samples, size, micro, ranks, multiple = (rng.randint(1, most) for most in (40, 16, 5, 4, 3))
        batches = in_batches(lambda first, count: range(first, first + count), samples, size)
        seen: list[int] = []
        for batch in batches:
            each = [batch.filled(micro, rank, ranks, multiple) for rank in range(ranks)]
            assert len({len(found) for found in each}) == 1
            assert len(each[0]) % multiple == 0
            assert {len(read) for found in each for read, _ in found} == {micro}
            assert len(each[0]) * micro * ranks < batch.count + micro * ranks * multiple
            seen += [n for found in each for read, counted in found for n in read[:counted]]
            # the mean of the samples' numbers, from the ranks' shares
            total = 0.0
            for found in each:
                means = [sum(read[:counted]) / max(1, counted) for read, counted in found]
                total += batch.share_of_mean(means, [counted for _, counted in found], ranks)
            assert total == pytest.approx(batch.first + (batch.count - 1) / 2)
        assert sorted(seen) == list(range(samples))
        middles = [batch.first + (batch.count - 1) / 2 for batch in batches]
        assert mean_over(batches, middles) == pytest.approx((samples - 1) / 2)


def reader(config: RunConfig) -> Any:
    return (
        open_data(config).validation_batch if config.model.family == "resnet" else on_ranks.tokens
    )


def validation_losses(config: RunConfig, layers: int) -> list[float]:
    """For each of ``COUNTS``, and in the end the mean of two validations of 8 samples each."""
    engine, read = on_ranks.start(config, layers), reader(config)
    size = config.train.global_batch
    found = [engine.evaluate(in_batches(read, count, size)) for count in COUNTS]
    found.append(sum(engine.evaluate([GlobalBatch(read, at, 8)]) for at in (0, 8)) / 2)
    engine.close()
    return found


def sample_losses(config: RunConfig, layers: int) -> list[float]:
    """Of each sample alone, on one rank."""
    engine, read = on_ranks.start(config, layers), reader(config)
    found = [engine.evaluate([GlobalBatch(read, number, 1)]) for number in range(max(COUNTS))]
    engine.close()
    return found


@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        ("gpt2", [(4, []), (2, [TP]), (4, [PP]), (4, [PP, TP]), (2, [PP, VPP])]),
        ("mixtral", [(2, [EP]), (4, [EP, PP]), (4, [EP, TP, "parallel.expert_tensor=1"])]),
        ("deepseek_v3", [(2, [EP]), (4, [PP])]),
        ("llama3", [(2, [DEEPSPEED, "parallel.zero_stage=3"]), (4, [DEEPSPEED])]),
        ("resnet", [(1, []), (4, [])]),
    ],
)
def test_the_mean_is_of_exactly_these_samples_on_every_layout(
    pool: Pool, family: str, layouts: list[tuple[int, list[str]]]
) -> None:
    def config(*words: str) -> RunConfig:
        if family == "resnet":
            return resnet_on_ranks.small_config([*words, "train.global_batch=8"])
        predicts = ["model.mtp_layers=1"] if family == "deepseek_v3" else []
        return on_ranks.family_config(family, [*words, *predicts])

    alone = pool.run(1, sample_losses, config("train.micro_batch=1"), 4)[0]
    expected = [sum(alone[:count]) / count for count in COUNTS]
    assert expected[0] != pytest.approx(expected[1], rel=1e-4)  # samples differ
    for world, words in layouts:
        *found, two = pool.run(world, validation_losses, config(*words), 4)[0]
        assert found == pytest.approx(expected, rel=1e-5), (world, words)
        assert found[-1] == two  # whole batches: to the bit the plain mean of their means
