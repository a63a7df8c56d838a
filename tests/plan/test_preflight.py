"""Preflight: every error names its field, every warning its failure signature."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_progressive.config import ConfigError, RunConfig, from_dict
from megatron_progressive.plan.preflight import check_run, smallest_world


def config(
    expansion: list[dict[str, Any]] | None = None, layers: int = 0, **sections: Any
) -> RunConfig:
    """The tiny preset (4 heads, ffn 256, vocabulary 2048), 100 steps, zero to six layers."""
    values = {
        "model": {"family": "gpt2", "num_layers": layers},
        "train": {"steps": 100, "global_batch": 16, "micro_batch": 4},
        "expansion": [{"at": 0.5, "to_layers": 6}] if expansion is None else expansion,
    }
    return from_dict({**values, **sections})


def growth(**more: Any) -> list[dict[str, Any]]:
    return [{"at": 0.5, "to_layers": 6, **more}]


def test_a_sound_run_passes_without_a_word() -> None:
    assert check_run(config(), 1) == []
    assert check_run(config(expansion=[]), 2) == []


@pytest.mark.parametrize(
    ("bad", "world", "field", "value"),
    [
        (config(parallel={"tensor": 3}), 4, "parallel", "tensor 3"),
        (config(growth(parallel={"pipeline": 3})), 4, "expansion[0].parallel", "pipeline 3"),
        (config(parallel={"tensor": 8}), 8, "parallel.tensor", "got 8"),
        (config(growth(parallel={"tensor": 8}), train={"global_batch": 32}), 8,
         "expansion[0].parallel.tensor", "got 8"),
        (
            config(model={"family": "gpt2", "num_layers": 0, "ffn_hidden_size": 250},
                   parallel={"tensor": 4}),
            4, "parallel.tensor", "ffn_hidden_size 250",
        ),
        (
            config(
                model={"family": "gpt2", "num_layers": 0, "hidden_size": 192,
                       "num_attention_heads": 96}, parallel={"tensor": 3},
            ), 3, "parallel.tensor", "vocabulary 2048",
        ),
        (config(growth(parallel={"pipeline": 4})), 4, "expansion[0].parallel.pipeline", "got 4"),
        (config(growth(parallel={"pipeline": 4})), 4, "expansion[0].parallel.pipeline",
         "or expansion[0].parallel.uneven: true"),
        (config(growth(parallel={"virtual_pipeline": 2})), 2,
         "expansion[0].parallel.virtual_pipeline", "got 2 with pipeline 1"),
        (config(growth(parallel={"pipeline": 2, "virtual_pipeline": 2})), 2,
         "expansion[0].parallel.virtual_pipeline", "got 2 x pipeline 2"),
        (config(parallel={"pipeline": 2, "virtual_pipeline": 3},
                train={"steps": 100, "global_batch": 24, "micro_batch": 8}), 2,
         "train.global_batch", "multiple of 16 (micro_batch 8 x 2 stages"),
        (config(), 3, "train.global_batch", "multiple of 12"),
        (config(parallel={"pipeline": 8}, expansion=growth(parallel={"pipeline": 1})), 8,
         "train.global_batch", "multiple of 32"),
        (config(growth(at=1e300)), 1, "expansion[0].at", "got 1e+300; accepted"),
        (config(growth(at=3.5)), 1, "expansion[0].at", "got 3.5"),
        (config(growth(at=0.0)), 1, "expansion[0].at", "step 0"),
        (config(growth(at=-0.2)), 1, "expansion[0].at", "step -20"),
        (config(growth(at=100)), 1, "expansion[0].at", "got 100"),
        (config(growth(at=0.999)), 1, "expansion[0].at", "step 100"),
        (
            config([{"at": 0.5, "to_layers": 2}, {"at": 0.5, "to_layers": 6}]), 1,
            "expansion[1].at", "step 50",
        ),
        (
            config([{"at": 60, "to_layers": 2}, {"at": 0.5, "to_layers": 6}]), 1,
            "expansion[1].at", "step 60",
        ),
        (config(layers=6), 1, "expansion[0].to_layers", "got 6"),
        (
            config([{"at": 0.2, "to_layers": 4}, {"at": 0.5, "to_layers": 3}]), 1,
            "expansion[1].to_layers", "got 3",
        ),
        (config(growth(init="copying")), 1, "expansion[0].init", "'copying'"),
        (config(growth(init="copying_zeroL")), 1, "expansion[0].init", "'copying_zeroL'"),
        (config(schedule={"warmup": 0.5, "decay": 0.6}), 1, "schedule.decay", "got 0.6"),
    ],
)  # fmt: skip
def test_errors_are_one_line_that_names_field_value_and_fix(
    bad: RunConfig, world: int, field: str, value: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_run(bad, world)
    message = str(caught.value)
    assert message.startswith(f"{field}: "), message
    assert value in message
    assert "accepted: " in message
    assert "\n" not in message


def family(
    name: str, layers: int = 4, after: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:
    """The tiny preset of a family; with ``after`` it grows from 0 layers to that layout."""
    model = {"family": name, "num_layers": layers, **sections.pop("model", {})}
    train = {"steps": 100, "global_batch": 64, "micro_batch": 2}
    expansion: list[dict[str, Any]] = []
    if after is not None:
        model["num_layers"] = 0
        expansion = [{"at": 0.5, "to_layers": layers, "parallel": after}]
    return from_dict({"model": model, "train": train, "expansion": expansion, **sections})


@pytest.mark.parametrize(
    ("bad", "world", "field", "words"),
    [
        (family("llama3", parallel={"tensor": 8}), 8, "parallel.tensor",
         ["got 8", "a divisor of num_query_groups 4"]),
        (family("deepseek_v3", model={"mtp_layers": 1, "tie_embeddings": True},
                parallel={"engine": "deepspeed", "zero_stage": 3}), 2, "parallel.zero_stage",
         ["got 3 with model.mtp_layers 1", "accepted: 0, 1, 2"]),
        (family("llama3", parallel={"expert": 2}), 2, "parallel.expert",
         ["got 2", "accepted: 1 (family llama3 has no experts)"]),
        (family("gpt2", parallel={"expert_tensor": 1}), 2, "parallel.expert_tensor",
         ["got 1", "accepted: none (family gpt2 has no experts)"]),
        (family("qwen3", after={"expert": 4}), 4, "expansion[0].parallel.expert", ["family qwen3"]),
        (family("mixtral", parallel={"expert": 3}), 6, "parallel.expert",
         ["got 3", "a divisor of 2 (model.moe.num_experts is 8)"]),
        (family("mixtral", after={"expert": 16}), 16, "expansion[0].parallel.expert",
         ["got 16", "a divisor of 8"]),
        (family("mixtral", parallel={"expert": 4, "tensor": 2}), 4, "parallel.expert",
         ["got 4", "with tensor 2", "a divisor of 2"]),
        (family("mixtral", parallel={"expert": 2, "tensor": 2, "expert_tensor": 4}), 4,
         "parallel.expert", ["got 2", "with expert_tensor 4", "a divisor of 1"]),
        (family("mixtral", after={"expert": 2, "engine": "deepspeed"}), 2,
         "expansion[0].parallel.expert", ["got 2 with engine deepspeed", "accepted: 1"]),
        (family("mixtral", parallel={"expert_tensor": 2, "engine": "deepspeed"}), 2,
         "parallel.expert_tensor", ["got 2 with engine deepspeed", "accepted: 1"]),
        (family("mixtral", model={"moe": {"ffn_hidden_size": 90}}, parallel={"tensor": 4}), 4,
         "parallel.tensor", ["got 4", "a divisor of moe.ffn_hidden_size 90"]),
        (family("mixtral", model={"moe": {"ffn_hidden_size": 90}},
                after={"tensor": 2, "expert_tensor": 4}), 4,
         "expansion[0].parallel.expert_tensor", ["got 4", "a divisor of moe.ffn_hidden_size 90"]),
        (family("mixtral", parallel={"tensor": 4}, data={"sequence_length": 30}), 4,
         "parallel.tensor", ["got 4", "a divisor of sequence_length 30"]),
        (family("deepseek_v3", model={"moe": {"ffn_hidden_size": 47}},
                parallel={"tensor": 2, "expert_tensor": 1}), 2,
         "parallel.tensor", ["got 2", "a divisor of moe.shared_experts x ffn_hidden_size 47"]),
        (family("deepseek_v3", model={"mla": {"q_lora_rank": 30}}, parallel={"tensor": 4}), 4,
         "parallel.tensor", ["a divisor of mla.q_lora_rank 30"]),
        (family("deepseek_v3", model={"mla": {"kv_lora_rank": 25}}, parallel={"tensor": 2}), 2,
         "parallel.tensor", ["a divisor of mla.kv_lora_rank + qk_rope_head_dim 33"]),
        (family("deepseek_v3", model={"ffn_hidden_size": 99}, parallel={"tensor": 2}), 2,
         "parallel.tensor", ["a divisor of ffn_hidden_size 99"]),
    ],
)  # fmt: skip
def test_errors_of_families_and_experts(
    bad: RunConfig, world: int, field: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_run(bad, world)
    message = str(caught.value)
    assert message.startswith(f"{field}: "), message
    for word in (*words, "accepted: "):
        assert word in message, message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("good", "world"),
    [
        (family("llama3", parallel={"tensor": 4}), 4),
        # experts before there are any, and a width that only expert layers would cut
        (family("mixtral", layers=0, parallel={"expert": 2, "tensor": 2}), 4),
        (family("deepseek_v3", layers=1, parallel={"expert": 4, "expert_tensor": 1, "tensor": 2},
                model={"moe": {"ffn_hidden_size": 47}}), 4),
        (family("mixtral", after={"tensor": 4, "expert_tensor": 1, "expert": 4}), 4),
        (family("mixtral", model={"moe": {"ffn_hidden_size": 90}},
                parallel={"tensor": 4, "expert_tensor": 2, "expert": 2}), 4),
        (family("mixtral", parallel={"engine": "deepspeed", "expert_tensor": 1}), 2),
        (family("deepseek_v3", model={"mtp_layers": 1, "mla": {"q_lora_rank": 0}},
                parallel={"tensor": 4, "pipeline": 4, "expert": 2}), 32),
    ],
)  # fmt: skip
def test_sound_layouts_of_families_pass(good: RunConfig, world: int) -> None:
    assert check_run(good, world) == []


@pytest.mark.parametrize(
    ("good", "world"),
    [
        (config(parallel={"pipeline": 4}, expansion=growth(parallel={"pipeline": 2})), 4),
        (config(growth(parallel={"pipeline": 4, "uneven": True})), 4),
        (config(growth(parallel={"pipeline": 2, "virtual_pipeline": 2, "uneven": True})), 2),
        (config(growth(parallel={"pipeline": 2, "virtual_pipeline": 3})), 2),
        # fewer layers than virtual stages: some are empty
        (config(parallel={"pipeline": 2, "virtual_pipeline": 6}, layers=3), 2),
        (config(layers=1, expansion=growth(init="copying_zeroN")), 1),
        (config(growth(at=50)), 1),
        (config(growth(at=1)), 1),
        (config(schedule={"warmup": 0.3, "decay": 0.1}, expansion=growth(at=0.6)), 1),
        (config(expansion=[], schedule={"warmup": 0.7, "decay": 0.3}), 1),
        (config(expansion=[], schedule={"name": "cosine", "warmup": 0.95}), 1),
    ],
)
def test_sound_corner_cases_pass(good: RunConfig, world: int) -> None:
    assert check_run(good, world) == []


@pytest.mark.parametrize(
    ("risky", "signatures"),
    [
        # 20 % decay after 0.8 T: the first step after the expansion already decays
        (
            config(growth(at=0.8), schedule={"decay": 0.2}),
            ["loss spike > 2x at expansion; likely cause: expansion during decay"],
        ),
        (
            config(growth(at=0.85)),
            ["final loss >= 5 % worse than fixed-size; likely cause: tau > 0.8 T"],
        ),
        (config(growth(at=0.95)), ["expansion during decay", "tau > 0.8 T"]),
        (
            config(schedule={"name": "cosine"}),
            ["final loss >= 5 % worse than fixed-size; likely cause: cosine schedule"],
        ),
        (config(schedule={"name": "linear"}), ["likely cause: linear schedule"]),
        (config(growth(init="zero")), ["kills the gradient"]),
        (
            config(growth(insert="top"), layers=1),
            ["instability after expansion; likely cause: random layers at the top"],
        ),
        (config(growth(insert="top", init="copying"), layers=1), []),
        (config(growth(insert="middle"), layers=2), []),  # trained layers stay at the head
        (
            family("deepseek_v3", model={"num_layers": 1}, expansion=growth(insert="middle")),
            ["insert: middle with init random puts new layers of one kind above trained ones"],
        ),
        # the trained dense layer stays below the new ones with experts
        (
            family("deepseek_v3", model={"num_layers": 1}, expansion=growth()),
            ["insert: bottom with init random puts new layers of one kind above trained ones"],
        ),
        (family("deepseek_v3", model={"num_layers": 1}, expansion=growth(init="copying")), []),
        (family("mixtral", model={"num_layers": 1}, expansion=growth()), []),
        (config(growth(insert="top")), []),  # no trained layer: top and bottom are the same
        (config(growth(at=0.49), schedule={"name": "cosine"}), []),
        (config(growth(at=0.8)), []),
        (config(growth(at=0.8), train={"steps": 1002}), []),  # 0.8 T rounds up
    ],
)
def test_warnings_name_the_failure_signature(risky: RunConfig, signatures: list[str]) -> None:
    warnings = check_run(risky, 1)
    assert len(warnings) == len(signatures), warnings
    for warning, signature in zip(warnings, signatures, strict=True):
        assert signature in warning
        assert warning.startswith("expansion[0].")
        assert "\n" not in warning


def test_smallest_world_counts_the_ranks_of_a_sequence() -> None:
    run = family("llama3", parallel={"context": 2, "tensor": 2, "pipeline": 2})
    assert smallest_world(run) == 8


def test_parts_of_a_sequence_divide_again_where_experts_need_it() -> None:
    parallel, length = {"context": 2, "tensor": 4}, {"sequence_length": 36}
    check_run(family("llama3", parallel=parallel, data=length), 8)
    with pytest.raises(ConfigError, match=r"parallel\.context: got 2 with experts, tensor 4 and"):
        check_run(family("mixtral", parallel=parallel, data=length), 8)


def test_smallest_world_fits_every_phase() -> None:
    run = config(parallel={"tensor": 2}, expansion=growth(parallel={"tensor": 1, "pipeline": 3}))
    assert smallest_world(run) == 6
    experts = {"tensor": 2, "expert": 4, "expert_tensor": 1, "pipeline": 2}
    run = family("mixtral", parallel={"expert": 8}, after=experts)
    assert smallest_world(run) == 8
    check_run(run, 8)
    assert smallest_world(family("mixtral", parallel={"expert": 8, "tensor": 2})) == 16


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            family("resnet", 1, expansion=growth(init="copying", block=[0, 1])),
            ["expansion[0].block: got [0, 1] for family resnet", "none (its layers are in"],
        ),
        (
            family("deepseek_v3", 3, expansion=growth(init="copying", block=[0, 1])),
            ["expansion[0].block: got [0, 1], which has no layer of the kind 'moe' that 3 new",
             "a block with one of the layers 1 to 2"],
        ),
        (
            config(growth(init="copying", block=[2, 2]), layers=3),
            ["expansion[0].block: got [2, 2]", "0 <= first < last <= 3, the layers before it"],
        ),
    ],
)  # fmt: skip
def test_a_block_is_of_layers_that_can_be_copied(bad: RunConfig, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_run(bad, 1)
    for word in words:
        assert word in str(caught.value)


def test_a_block_without_a_kind_is_fine_where_that_kind_does_not_grow() -> None:
    check_run(family("deepseek_v3", 3, expansion=growth(init="copying", block=[1, 2])), 1)
