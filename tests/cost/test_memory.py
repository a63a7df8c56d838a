"""Predicted memory against the state of real engines."""

from __future__ import annotations

import pytest

from megatron_progressive.config import RunConfig
from megatron_progressive.cost.memory import MASTER, MOMENTS, MOMENTUM, largest_rank, stage_tensors
from megatron_progressive.models import model_shape, tensor_table
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.runtime.layout import Layout, make_layout
from tests.cost import counts_on_ranks
from tests.engines.on_ranks import family_config, small_config
from tests.pool import Pool


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (4, ["parallel.tensor=2", "parallel.pipeline=2", "train.precision=bf16"]),
        (4, ["parallel.pipeline=2", "parallel.tensor=2", "optim.embeddings=adamw"]),
        (0, ["parallel.pipeline=4", "train.precision=bf16", "model.tie_embeddings=false"]),
        (2, ["parallel.pipeline=4"]),
        (4, ["optim.name=adamw", "train.precision=bf16", "parallel.zero_stage=0"]),
        (4, ["optim.name=adamw", "train.precision=bf16", "parallel.tensor=2"]),
        (4, ["optim.name=adamw", "parallel.pipeline=2"]),
        (4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.precision=bf16"]),
        (7, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "optim.name=adamw"]),
        (5, ["parallel.pipeline=4", "model.tie_embeddings=false"]),
    ],
)
def test_prediction_equals_what_the_fullest_rank_of_an_engine_holds(
    pool: Pool, layers: int, words: list[str]
) -> None:
    check(pool, small_config([*words, f"model.num_layers={layers}", "train.micro_batch=1"]))


def check(pool: Pool, config: RunConfig) -> None:
    """Compare the prediction for the fullest rank with that of an engine on four ranks."""
    predicted = largest_rank(model_shape(config), config, make_layout(config.parallel, 4))
    held = pool.run(4, counts_on_ranks.state_bytes, config)
    fullest = max(held, key=lambda sizes: sum(v for k, v in sizes.items() if k != "elements"))
    assert predicted.parameters == fullest["param"]
    assert predicted.gradients == 4 * fullest["elements"]
    slots = {
        MASTER: fullest.get("master", 0),
        MOMENTUM: fullest.get("momentum", 0),
        MOMENTS: fullest.get("exp_avg", 0) + fullest.get("exp_avg_sq", 0),
    }
    # the distributed optimizer pads and cuts a flat buffer: its shares are not quite equal
    sharded = config.parallel.zero_stage == 1
    for kind, size in slots.items():
        assert predicted.optimizer.get(kind, 0) == pytest.approx(size, rel=0.05 if sharded else 0)


@pytest.mark.parametrize(
    ("family", "layers", "words"),
    [
        ("llama3", 3, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.uneven=true"]),
        ("qwen3", 2, ["optim.name=adamw", "train.precision=bf16", "parallel.tensor=4"]),
        ("mixtral", 2, ["parallel.expert=4", "train.precision=bf16"]),
        ("mixtral", 2, ["parallel.expert=2", "parallel.tensor=2", "parallel.zero_stage=0"]),
        ("mixtral", 2, ["parallel.expert=2", "optim.name=adamw", "train.precision=bf16"]),
        ("mixtral", 1, ["parallel.tensor=2", "parallel.expert_tensor=1", "parallel.expert=2",
                        "optim.name=adamw"]),
        ("mixtral", 0, ["parallel.expert=2", "parallel.tensor=2"]),
        ("deepseek_v3", 2, ["parallel.expert=2", "parallel.tensor=2", "parallel.expert_tensor=2",
                            "optim.name=adamw", "train.precision=bf16"]),
        ("deepseek_v3", 3, ["parallel.pipeline=2", "parallel.expert=2", "model.mtp_layers=1",
                            "train.precision=bf16"]),
        ("deepseek_v3", 1, ["parallel.pipeline=4", "model.mtp_layers=2", "optim.name=adamw",
                            "parallel.zero_stage=0"]),
        ("deepseek_v3", 3, ["parallel.pipeline=2", "model.mtp_layers=1", "optim.name=adamw",
                            "model.tie_embeddings=true"]),
    ],
)  # fmt: skip
def test_prediction_for_families_and_experts(
    pool: Pool, family: str, layers: int, words: list[str]
) -> None:
    config = family_config(family, [*words, f"model.num_layers={layers}", "train.micro_batch=1"])
    check(pool, config)


@pytest.mark.parametrize("optimizer", ["adamw", "muon_nsgd"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_prediction_equals_what_a_zero_stage_holds(pool: Pool, stage: int, optimizer: str) -> None:
    config = small_config(
        ["parallel.engine=deepspeed", f"parallel.zero_stage={stage}", "model.num_layers=2",
         f"optim.name={optimizer}", "train.precision=bf16"]
    )  # fmt: skip
    predicted = largest_rank(model_shape(config), config, make_layout(config.parallel, 2))
    held = pool.run(2, counts_on_ranks.state_bytes, config)[0]
    assert predicted.parameters == pytest.approx(held["param"], rel=0.05 if stage == 3 else 0)
    for kind, slots in {MASTER: ["master"], MOMENTUM: ["momentum"],
                        MOMENTS: ["exp_avg", "exp_avg_sq"]}.items():  # fmt: skip
        size = sum(held.get(slot, 0) for slot in slots)
        assert predicted.optimizer.get(kind, 0) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("layers", [0, 1, 3, 4, 12])
@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("tie", [True, False])
def test_stages_hold_the_model_and_one_copy_of_a_tied_embedding(
    layers: int, pipeline: int, virtual: int, tie: bool
) -> None:
    config = small_config([f"model.tie_embeddings={tie}"])
    shape = model_shape(config, layers)
    stages = stage_tensors(shape, Layout(pipeline, pipeline=pipeline, virtual_pipeline=virtual))
    copy = shape.padded_vocab_size * shape.hidden_size if tie and pipeline > 1 else 0
    assert sum(s.numel for stage in stages for s in stage) == numel(shape) + copy


def numel(shape: TransformerShape) -> int:
    """Elements of a model, the vocabulary's padding included."""
    return sum(spec.numel for spec in tensor_table(shape).values())


@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_prediction_modules_are_on_the_last_stage_with_the_embedding(pipeline: int) -> None:
    shape = model_shape(family_config("deepseek_v3", ["model.mtp_layers=2"]), 4)
    stages = stage_tensors(shape, Layout(pipeline, pipeline=pipeline))
    projections = [[s.role for s in stage].count("mtp_proj") for stage in stages]
    assert projections == [0] * (pipeline - 1) + [2]
    embeddings = [[s.role for s in stage].count("embedding") for stage in stages]
    assert (embeddings[0], embeddings[-1], sum(embeddings)) == (1, 1, min(pipeline, 2))
