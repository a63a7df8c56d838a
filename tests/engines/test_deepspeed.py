"""The DeepSpeed engine on real gloo ranks: against the Megatron engine and the reference."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch

from megatron_progressive.config import RunConfig
from megatron_progressive.engines.deepspeed import state as deepspeed_state
from megatron_progressive.models import model_shape
from tests.engines import deepspeed_on_ranks, on_ranks, reference
from tests.pool import Pool

STAGES = (3, 2, 1, 0)
Pair = tuple[RunConfig, list[RunConfig]]


def zero(stage: int) -> list[str]:
    return ["parallel.engine=deepspeed", f"parallel.zero_stage={stage}"]


def pair(layers: int, words: list[str], stages: tuple[int, ...] = STAGES) -> Pair:
    words = [f"model.num_layers={layers}", *words]
    return on_ranks.small_config(words), [on_ranks.small_config([*words, *zero(s)]) for s in stages]


def check_against_megatron(
    pool: Pool, world: int, pairs: list[Pair], exchange_numel: int | None = None
) -> None:
    results = pool.run(world, deepspeed_on_ranks.against_megatron, pairs, 6, exchange_numel)
    for i, j, loss, norm, state in results[0]:
        config = pairs[i][1][j]
        bf16 = config.train.precision == "bf16"
        found = (config.parallel.zero_stage, config.optim.name, config.model.num_layers)
        assert loss < (2e-3 if bf16 else 2e-5), (found, loss)
        assert norm < (2e-2 if bf16 else 2e-4), (found, norm)
        if not bf16:  # rounding to bf16 turns the smallest difference into a large one
            assert state[0] < 2e-4, (found, state)


@pytest.mark.parametrize("optimizer", ["adamw", "muon_nsgd"])
def test_losses_and_state_equal_the_megatron_engines(pool: Pool, optimizer: str) -> None:
    # Key biases have no gradient but rounding, which AdamW would blow up to whole steps.
    base = [f"optim.name={optimizer}", "optim.eps=1e-4"]
    untied, clipped = "model.tie_embeddings=false", "optim.clip_grad=0.5"
    check_against_megatron(
        pool, 2, [pair(0, base), pair(1, [*base, untied]), pair(3, [*base, clipped])]
    )


def test_settings_of_the_optimizer_reach_it(pool: Pool) -> None:
    words = ["optim.embeddings=adamw", "optim.scale=moonlight", "optim.nesterov=false",
             "optim.weight_decay=0.1", "model.linear_bias=true"]  # fmt: skip
    # 5000 elements: several exchanges of a few matrices each
    check_against_megatron(pool, 4, [pair(2, words, (3, 1))], exchange_numel=5000)
    check_against_megatron(pool, 1, [pair(1, words, (3, 2))])


def test_bf16_follows_the_megatron_engine(pool: Pool) -> None:
    bf16 = "train.precision=bf16"
    pairs = [pair(2, [bf16, f"optim.name={name}"]) for name in ("adamw", "muon_nsgd")]
    check_against_megatron(pool, 2, pairs)


def expansion(
    source: int, init: str, before: list[str], after: dict[str, Any], words: list[str]
) -> RunConfig:
    section = {"at": 2, "to_layers": 4, "init": init, "parallel": after}
    return on_ranks.small_config([f"model.num_layers={source}", *before, *words], section)


def check_expansions(pool: Pool, world: int, configs: list[RunConfig]) -> None:
    results = pool.run(world, deepspeed_on_ranks.expansions, configs)[0]
    for config, (before, after, still) in zip(configs, results, strict=True):
        section = config.expansion[0]
        expected = reference.expanded(
            before, model_shape(config, section.to_layers), config.model.num_layers or 0,
            section.init, section.order, section.insert, section.optimizer_state,
            config.run.seed, lambda name, optim=config.optim: optim.name == "adamw",
        )  # fmt: skip
        assert set(after) == set(expected)
        different = [key for key in expected if not torch.equal(after[key], expected[key])]
        assert not different, (config.parallel, section.parallel)
        assert not still, (config.parallel, section.parallel)


def stage(number: int) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": number, "tensor": 1}


MEGATRON = {"engine": "megatron", "zero_stage": 1}


def test_expansion_between_stages_equals_the_reference_bit_for_bit(pool: Pool) -> None:
    """Sizes that 3 ranks do not divide, and vectors of which one rank holds nothing."""
    odd = ["model.hidden_size=4", "model.num_attention_heads=2"]
    adamw, bf16 = ["optim.name=adamw"], ["train.precision=bf16"]
    configs = [
        expansion(1, "copying", zero(3), stage(3), odd),
        expansion(0, "random", zero(3), stage(1), [*odd, *adamw]),
        expansion(1, "copying", zero(1), stage(3), [*adamw, *bf16]),
        expansion(0, "random", zero(2), stage(0), bf16),
    ]
    check_expansions(pool, 3, configs)


def test_expansion_between_engines_equals_the_reference_bit_for_bit(pool: Pool) -> None:
    adamw, bf16 = ["optim.name=adamw"], ["train.precision=bf16"]
    untied = ["model.tie_embeddings=false"]
    configs = [
        expansion(0, "random", zero(3), {**MEGATRON, "tensor": 2}, []),
        expansion(1, "copying", zero(1), MEGATRON, [*adamw, *bf16]),
        expansion(1, "copying", [], stage(3), [*bf16, *untied]),
        expansion(0, "random", ["parallel.tensor=2"], stage(2), adamw),
        expansion(1, "copying", [], stage(0), [*adamw, *bf16]),
    ]
    check_expansions(pool, 2, configs)


def test_nothing_outlives_an_engine(pool: Pool) -> None:
    turns = [(3, 3), (1, 3), (3, 0), (2, 1), (3, 3), (0, 2)]
    configs = [
        expansion(1, "copying", zero(a), stage(b), ["optim.name=adamw"])
        for a, b in [*turns[:1], *turns]
    ]
    found = pool.run(2, deepspeed_on_ranks.resources_over_expansions, configs)[0]
    assert {r.groups for r in found} == {1}  # the world's own
    assert len({r.tensors for r in found[1:]}) == 1  # the first engine loads modules


def test_nothing_is_printed(pool: Pool) -> None:
    configs = [
        on_ranks.small_config([*zero(s), f"train.precision={precision}"])
        for s in STAGES
        for precision in ("fp32", "bf16")
    ]
    assert pool.run(2, deepspeed_on_ranks.output, configs) == ["", ""]


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed_state.check_version()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.20.0")
    with pytest.raises(RuntimeError, match=r"^deepspeed: got version 0.20.0; accepted: 0.19.8$"):
        deepspeed_state.check_version()


def test_twenty_losses_after_an_expansion_equal_the_megatron_engines(pool: Pool) -> None:
    section = {"at": 3, "to_layers": 6, "init": "random"}
    words = ["optim.name=adamw", "model.num_layers=0"]
    runs = [[], zero(1), zero(2), zero(3)]
    configs = [on_ranks.small_config([*words, *w], section) for w in runs]
    expected, *found = pool.run(2, deepspeed_on_ranks.losses_after_expansion, configs, 20)[0]
    assert len(expected) == 20
    assert len({round(loss, 3) for loss in expected}) > 10
    for losses in found:
        difference = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
        print(difference)
        assert difference < 2e-4


def test_ten_expansions_leave_nothing(pool: Pool) -> None:
    """Onto each engine in turn, in one process, after two that load modules and fill pools."""
    layouts: list[dict[str, Any]] = [stage(3), {**MEGATRON, "tensor": 2}]
    configs = [expansion(1, "copying", zero(3), after, []) for after in layouts]
    found = pool.run(2, deepspeed_on_ranks.resources_over_expansions, configs * 6)[0]
    print(found)
    found = found[2:]
    assert {r.groups for r in found} == {1}
    for same_engine in (found[0::2], found[1::2]):
        # gloo's threads may close a last socket a moment later; one kept each time would be 8
        files = [r.files for r in same_engine]
        assert max(files) - min(files) < 3
    assert len({r.threads for r in found}) == len({r.tensors for r in found}) == 1
    assert max(r.resident_bytes for r in found) - found[0].resident_bytes < 4 << 20
