"""Learning-rate schedules against a page of plain code."""

from __future__ import annotations

import math
import random

import pytest

from megatron_progressive.config import ConfigError, RunConfig, from_dict
from megatron_progressive.optim.schedule import learning_rate, rewarmed, rewarms_new_layers
from megatron_progressive.plan.preflight import check_run


def plain_rates(
    name: str, lr: float, steps: int, warmup: int, decay: int, taus: list[int], climb: int,
    start: float,
) -> list[float]:  # fmt: skip
    """The rate of each step, step by step: the schedule, and after each expansion the climb."""
    rates = []
    for step in range(1, steps + 1):
        left = steps + 1 - step
        if step <= warmup:
            rate = lr * step / warmup
        elif name == "wsd":
            rate = lr if left > decay else lr * left / (decay + 1)
        else:
            part = 1 - left / (steps + 1 - warmup)
            rate = lr * ((1 + math.cos(math.pi * part)) / 2 if name == "cosine" else 1 - part)
        for number, tau in enumerate(taus):
            after = [*taus, steps][number + 1]
            if tau < step <= min(tau + climb, after):
                rate *= start + (1 - start) * (step - tau) / climb
        rates.append(rate)
    return rates


def random_run(seed: int, **schedule: object) -> RunConfig:
    rng = random.Random(seed)
    steps = rng.randint(20, 300)
    taus = sorted(rng.sample(range(1, steps), rng.randint(0, 2)))
    depths = range(2, 2 + len(taus))
    return from_dict(
        {
            "model": {"family": "gpt2", "num_layers": 1},
            "train": {"steps": steps},
            "optim": {"lr": 10 ** rng.uniform(-4, -1)},
            "schedule": {"name": rng.choice(["wsd", "cosine", "linear"]),
                         "warmup": rng.choice([0, rng.uniform(0, 0.3)]),
                         "decay": rng.choice([0, rng.uniform(0, 0.6)]), **schedule},
            "expansion": [{"at": at if at > 1 else 1, "to_layers": depth, "init": "copying"}
                          for at, depth in zip(taus, depths, strict=True)],
        }
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(100))
def test_rates_are_those_of_plain_code(seed: int) -> None:
    rng = random.Random(1000 + seed)
    rewarm, start = rng.choice([None, 0.0, rng.uniform(0, 0.3)]), rng.choice([None, rng.random()])
    layers = rng.choice([None, "all"])
    config = random_run(seed, rewarm=rewarm, rewarm_from=start, rewarm_layers=layers)
    steps, schedule = config.train.steps, config.schedule
    expected = plain_rates(
        schedule.name, config.optim.lr, steps, round(schedule.warmup * steps),
        round(schedule.decay * steps), config.expansion_steps(),
        round((rewarm or 0) * steps), start or 0.0,
    )  # fmt: skip
    assert [learning_rate(config, step) for step in range(1, steps + 1)] == pytest.approx(expected)
    # new layers alone: all others go on as if nothing had been configured
    alone = random_run(seed, rewarm=rewarm, rewarm_from=start, rewarm_layers="new")
    plain = random_run(seed)
    for step in range(1, steps + 1):
        share = rewarmed(alone, step)
        assert 0 <= share <= 1
        if rewarms_new_layers(alone):
            assert learning_rate(alone, step) == learning_rate(plain, step)
            assert learning_rate(config, step) == share * learning_rate(plain, step)


def run(**schedule: object) -> RunConfig:
    return from_dict(
        {
            "model": {"family": "gpt2", "num_layers": 1},
            "train": {"steps": 100},
            "schedule": schedule,
            "expansion": [{"at": 50, "to_layers": 2}, {"at": 60, "to_layers": 3}],
        }
    )


def test_a_climb_ends_before_the_next_expansion_and_with_the_run() -> None:
    check_run(run(rewarm=0.1), 1)
    with pytest.raises(ConfigError, match=r"schedule.rewarm: got 0.11, which is 11 steps; accepted:"
                                          r" up to the 10 from the expansion after step 50 to the"
                                          r" next expansion"):  # fmt: skip
        check_run(run(rewarm=0.11), 1)
    for name, value in (("rewarm_from", 0.1), ("rewarm_layers", "new")):
        with pytest.raises(ConfigError, match=f"schedule.{name}: got {value} without"):
            check_run(run(**{name: value}), 1)
