"""The Megatron engine and its expansion, on real gloo ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_progressive.config import RunConfig
from megatron_progressive.models import model_shape
from tests.engines import on_ranks, reference
from tests.pool import Pool

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (2, {"tensor": 2}),
    (2, {"pipeline": 2}),
    (4, {}),
    (4, {"tensor": 2}),
    (4, {"tensor": 2, "pipeline": 2}),
    (4, {"pipeline": 4}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (4, {"pipeline": 2, "virtual_pipeline": 2}),
    (4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}),
    (4, {"pipeline": 4, "virtual_pipeline": 2}),
    (2, {"tensor": 2, "sequence": "false"}),
    (2, {"context": 2}),
    (4, {"context": 2, "pipeline": 2, "virtual_pipeline": 2}),
    (1, {"recompute": "full", "recompute_layers": 2}),
    (4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "recompute": "full"}),
    (2, {"tensor": 2, "recompute": "selective",
         "recompute_modules": "[core_attn, layernorm, mlp]"}),
]  # fmt: skip


def words(parallel: dict[str, Any]) -> list[str]:
    return [f"parallel.{key}={value}" for key, value in parallel.items()]


@pytest.mark.parametrize("optimizer", ["adamw", "muon_nsgd"])
@pytest.mark.parametrize("layers", [0, 1, 4, 5])
def test_same_losses_on_every_layout(pool: Pool, optimizer: str, layers: int) -> None:
    base = [f"optim.name={optimizer}", "train.micro_batch=1"]
    expected = pool.run(1, on_ranks.losses_and_norms, on_ranks.small_config(base), layers, 6)[0]
    assert len({round(loss, 4) for loss, _ in expected}) == 6
    for world, parallel in LAYOUTS[1:]:
        if layers % 2 and layers > 1 and parallel.get("pipeline", 1) == 1:
            continue  # 5 layers are for uneven stages
        if not layers and parallel.get("recompute") == "selective":
            continue  # of which there are no parts
        config = on_ranks.small_config([*base, *words(parallel)])
        for result in pool.run(world, on_ranks.losses_and_norms, config, layers, 6):
            for (loss, norm), (loss_1, norm_1) in zip(result, expected, strict=True):
                assert loss == pytest.approx(loss_1, rel=2e-5), (world, parallel)
                assert norm == pytest.approx(norm_1, rel=2e-4), (world, parallel)


def check_expansion(pool: Pool, world: int, config: RunConfig) -> Any:
    """Run one expansion and compare every slot with the reference, bit for bit."""
    expansion = config.expansion[0]
    results = pool.run(world, on_ranks.expand_and_gather, config)
    before, after, event, losses = results[0]
    shape = model_shape(config, expansion.to_layers)
    expected = reference.expanded(
        before, shape, model_shape(config).num_layers, expansion.init, expansion.order,
        expansion.insert, expansion.optimizer_state, config.run.seed,
        lambda name: config.optim.name == "adamw" or (
            config.optim.embeddings == "adamw" and ("embedding" in name or "output" in name)
        ),
        expansion.block,
    )  # fmt: skip
    assert set(after) == set(expected)
    different = [key for key in expected if not torch.equal(after[key], expected[key])]
    assert not different
    assert all(torch.isfinite(torch.tensor(losses)))
    return event


@pytest.mark.parametrize(
    ("source", "init", "virtual"),
    [(1, "copying_zeroL", 1), (0, "zero", 1), (1, "copying_zeroL", 2)],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon_nsgd"])
def test_lossless_expansion_onto_another_layout(
    pool: Pool, source: int, init: str, virtual: int, optimizer: str
) -> None:
    after = {"tensor": 2, "pipeline": 2, "virtual_pipeline": virtual}
    expansion = {"at": 2, "to_layers": 6, "init": init, "parallel": after}
    config = on_ranks.small_config(
        [f"model.num_layers={source}", f"optim.name={optimizer}"], expansion
    )
    event = check_expansion(pool, 4, config)
    assert event.layout_before == "DP=4"
    assert event.layout_after == "DP=1 x TP=2 x PP=2" + " x VPP=2" * (virtual > 1)
    assert abs(event.loss_before - event.loss_after) < 1e-5


@pytest.mark.parametrize(
    ("source", "target", "placing"),
    [
        (3, 4, {"order": "stack"}),  # A B C A: trained layers keep their order
        (3, 5, {"order": "inter"}),
        (3, 7, {"order": "last", "insert": "top"}),
        (4, 7, {"order": "stack", "insert": "middle"}),
        (4, 6, {"order": "stack", "block": [1, 2]}),
        (4, 7, {"order": "stack", "block": [0, 3]}),
    ],
)
def test_zeroed_copies_keep_the_loss_wherever_they_are(
    pool: Pool, source: int, target: int, placing: dict[str, Any]
) -> None:
    expansion = {"at": 2, "to_layers": target, "init": "copying_zeroL", **placing}
    config = on_ranks.small_config([f"model.num_layers={source}"], expansion)
    event = check_expansion(pool, 1, config)
    assert abs(event.loss_before - event.loss_after) < 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "muon_nsgd"])
def test_every_weight_moves_in_the_step_after_an_expansion(pool: Pool, optimizer: str) -> None:
    expansion = {"at": 2, "to_layers": 4, "init": "random", "parallel": {"tensor": 2}}
    config = on_ranks.small_config([f"optim.name={optimizer}", "model.num_layers=0"], expansion)
    assert pool.run(2, on_ranks.trainable_after_expansion, config)[0] == []


@pytest.mark.parametrize(
    ("optimizer", "precision", "layers"),
    [
        ("adamw", "fp32", 5),
        ("adamw", "bf16", 1),
        ("muon_nsgd", "fp32", 1),
        ("muon_nsgd", "bf16", 5),
    ],
)
def test_checkpoint_onto_and_from_a_virtual_pipeline(
    pool: Pool, tmp_path: Path, optimizer: str, precision: str, layers: int
) -> None:
    base = [f"optim.name={optimizer}", f"train.precision={precision}", "train.micro_batch=1",
            f"model.num_layers={layers}"]  # fmt: skip
    plain = on_ranks.small_config([*base, "parallel.tensor=2"])
    virtual = on_ranks.small_config([*base, "parallel.pipeline=2", "parallel.virtual_pipeline=2"])
    for name, source, target in (("onto", plain, virtual), ("from", virtual, plain)):
        folder = tmp_path / name
        saved, loaded = pool.run(4, on_ranks.saved_and_loaded, source, target, folder)[0]
        assert set(saved) == set(loaded)
        assert [key for key in saved if not torch.equal(saved[key], loaded[key])] == []


def test_pipeline_settings_that_gloo_gets_wrong_are_refused() -> None:
    from megatron_progressive.engines.megatron.model import check_gloo_pipeline

    sound = {"batch_p2p_comm": False, "overlap_p2p_comm": False}
    check_gloo_pipeline(SimpleNamespace(**sound))  # type: ignore[arg-type]
    for name in sound:
        with pytest.raises(RuntimeError, match=name):
            check_gloo_pipeline(SimpleNamespace(**{**sound, name: True}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "parallel"),
    [
        ("gpt2", {"tensor": 2}),
        ("gpt2", {"pipeline": 2, "virtual_pipeline": 2}),
        ("llama3", {"tensor": 2}),
        ("deepseek_v3", {"expert": 2}),
        ("mixtral", {"engine": "deepspeed", "zero_stage": 2}),
    ],
)
def test_process_groups_are_released(pool: Pool, family: str, parallel: dict[str, Any]) -> None:
    expansion = {"at": 2, "to_layers": 3, "parallel": parallel}
    words = ["model.num_layers=2", "train.micro_batch=1"]
    config = on_ranks.family_config(family, words, expansion)
    counts = pool.run(2, on_ranks.groups_after_expansions, config, 4)[0]
    assert [groups for groups, _ in counts] == [1] * 4  # the world's own
    assert len({threads for _, threads in counts[1:]}) == 1, counts


@pytest.mark.parametrize(
    ("family", "parallel"),
    [
        ("gpt2", {"tensor": 2}),
        ("gpt2", {"pipeline": 2, "virtual_pipeline": 2}),
        ("llama3", {"zero_stage": 0}),
        ("mixtral", {"expert": 2}),
        ("deepseek_v3", {}),
        ("llama3", {"engine": "deepspeed", "zero_stage": 1}),
        ("llama3", {"engine": "deepspeed", "zero_stage": 3}),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_of_a_closed_engine_stays(
    pool: Pool, family: str, parallel: dict[str, Any], precision: str
) -> None:
    words = [f"parallel.{key}={value}" for key, value in parallel.items()]
    words += ["model.num_layers=2", "train.micro_batch=1", f"train.precision={precision}"]
    config = on_ranks.family_config(family, words)
    for left in pool.run(2, on_ranks.left_after_close, config):
        assert left == {"modules": 0, "parameters": 0, "bytes": 0}
