"""Predicted peak memory against the live tensors of real train steps, and published formulas."""

from __future__ import annotations

import pytest

from megatron_progressive.config import RunConfig, from_dict
from megatron_progressive.cost import activations
from megatron_progressive.cost.activations import fullest_rank, in_flight, stage_activations
from megatron_progressive.cost.memory import stage_memory
from megatron_progressive.models import model_shape
from megatron_progressive.optim.flat import EXCHANGE_NUMEL
from megatron_progressive.runtime.layout import Layout, make_layout
from tests.cost import memory_on_ranks
from tests.engines.on_ranks import family_config
from tests.pool import Pool

SIZES = ["model.hidden_size=64", "data.sequence_length=128", "train.global_batch=4",
         "train.micro_batch=4"]  # fmt: skip
MOE = "model.moe.first_k_dense=1"
CONTEXT = "parallel.context=2"


PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def check(pool: Pool, ranks: int, family: str, words: list[str]) -> None:
    """Predicted and measured peak of the fullest rank, within 5 %, in total and without what the
    engine holds between steps, of which activations are by far the larger part."""
    config = family_config(family, [*SIZES, *words])
    shape, layout = model_shape(config), make_layout(config.parallel, ranks)
    predicted = fullest_rank(shape, config, layout, fused=False)
    times = 2 if config.train.precision == "fp32" else 1  # bf16 has fp32 gradients and weights
    if config.parallel.recompute == "none":
        assert predicted.activations.total > times * predicted.state.total
    measured = pool.run(ranks, memory_on_ranks.peak_bytes, config)
    assert predicted.total == pytest.approx(max(measured), rel=0.05)


@PRECISIONS
@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt2", ["model.num_layers=0"]),
        ("gpt2", ["model.num_layers=2"]),
        ("gpt2", ["model.num_layers=3", "model.ffn_hidden_size=192"]),
        ("llama3", ["model.num_layers=3", "model.num_query_groups=2"]),
        ("llama3", ["model.num_layers=1", "data.vocab_size=1000", "data.sequence_length=256"]),
        ("qwen3", ["model.num_layers=2", "data.vocab_size=1024"]),
        ("mixtral", ["model.num_layers=2"]),
        ("mixtral", ["model.num_layers=1", "model.moe.top_k=3", "optim.name=adamw"]),
        ("deepseek_v3", ["model.num_layers=0"]),
        ("deepseek_v3", ["model.num_layers=2", MOE]),
        ("deepseek_v3", ["model.num_layers=2", MOE, "model.mtp_layers=1"]),
        ("deepseek_v3", ["model.num_layers=1", "model.moe.first_k_dense=0",
                         "model.mla.v_head_dim=12", "model.mla.q_lora_rank=0"]),
    ],
)  # fmt: skip
def test_prediction_is_within_a_twentieth_of_a_step(
    pool: Pool, family: str, words: list[str], precision: str
) -> None:
    check(pool, 1, family, [*words, f"train.precision={precision}"])


PARTS = ["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"]


def anew(modules: str) -> list[str]:
    return ["parallel.recompute=selective", f"parallel.recompute_modules=[{modules}]"]


ANEW = {
    "all": ["parallel.recompute=full"],
    "one layer": ["parallel.recompute=full", "parallel.recompute_layers=1"],
    **{part: anew(part) for part in PARTS},
    "several": anew("core_attn, layernorm"),
}


@PRECISIONS
@pytest.mark.parametrize("case", ANEW)
def test_what_is_computed_anew_is_not_kept(pool: Pool, case: str, precision: str) -> None:
    family = "deepseek_v3" if case in ("mla_up_proj", "moe", "shared_experts") else "gpt2"
    words = ["model.num_layers=3", f"train.precision={precision}", *ANEW[case]]
    check(pool, 1, family, [*words, MOE] if family == "deepseek_v3" else words)


WIDE = ["model.hidden_size=256", "data.sequence_length=8", "train.micro_batch=1"]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ["model.num_layers=0", "data.vocab_size=1024"]),
        (1, ["model.num_layers=1", "model.ffn_hidden_size=1024"]),
        (2, ["model.num_layers=1", "model.ffn_hidden_size=1024", "parallel.tensor=2"]),
    ],
)
def test_newton_schulz_at_the_peak(pool: Pool, ranks: int, words: list[str]) -> None:
    config = family_config("gpt2", [*SIZES, *WIDE, *words])
    shape, layout = model_shape(config), make_layout(config.parallel, ranks)
    predicted = fullest_rank(shape, config, layout, fused=False)
    assert predicted.activations.temporary > 10 * predicted.activations.kept
    measured = pool.run(ranks, memory_on_ranks.peak_bytes, config)
    assert predicted.total == pytest.approx(max(measured), rel=0.05)


@pytest.mark.parametrize(
    ("words", "exchange"),
    [
        # the embedding and the head are tensors of one stage each, or of the first stage alone
        (["parallel.pipeline=2", "model.tie_embeddings=false"], None),
        (["parallel.pipeline=2", "model.tie_embeddings=true"], None),
        # the embedding is a batch of its own, whole on one of the two ranks
        (["parallel.tensor=2", "model.tie_embeddings=true"], 1 << 16),
    ],
)
def test_newton_schulz_of_each_stage(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, words: list[str], exchange: int | None
) -> None:
    """Not the whole model's: each stage has its own matrices."""
    sizes = ["model.num_layers=2", "data.vocab_size=2048", "train.global_batch=2"]
    config = family_config("gpt2", [*SIZES, *WIDE, *sizes, *words])
    shape, layout = model_shape(config), make_layout(config.parallel, 2)
    if exchange is not None:
        monkeypatch.setattr(activations, "_BATCH", exchange)
    states = stage_memory(shape, config, layout)
    beside = stage_activations(shape, config, layout, fused=False)
    predicted = [s.total + a.total for s, a in zip(states, beside, strict=True)]
    measured = pool.run(2, memory_on_ranks.peak_bytes, config, exchange)
    if layout.pipeline == 1:
        measured = [max(measured)]
    if layout.pipeline > 1 and shape.tie_embeddings:  # the last stage gets the first one's update
        assert measured[1] < predicted[1] < 0.95 * predicted[0]
        predicted, measured = predicted[:1], measured[:1]
    assert predicted == pytest.approx(measured, rel=0.05)


def test_a_batch_of_updates_is_the_optimizers() -> None:
    assert activations._BATCH == EXCHANGE_NUMEL


MANY = ["train.global_batch=16", "train.micro_batch=2"]


@PRECISIONS
@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt2", ["model.num_layers=4", "parallel.tensor=2"]),
        ("llama3", ["model.num_layers=2", "parallel.tensor=2", "model.num_query_groups=2"]),
        ("mixtral", ["model.num_layers=2", "parallel.tensor=2", "train.micro_batch=2"]),
        ("mixtral", ["model.num_layers=1", "parallel.tensor=2", "parallel.expert_tensor=1",
                     "parallel.expert=2"]),
        ("mixtral", ["model.num_layers=2", "parallel.expert=2", "train.micro_batch=2"]),
        ("deepseek_v3", ["model.num_layers=2", MOE, "parallel.tensor=2"]),
        ("gpt2", ["model.num_layers=4", "parallel.pipeline=2", *MANY]),
        ("llama3", ["model.num_layers=4", "parallel.pipeline=2", "parallel.virtual_pipeline=2",
                    *MANY]),
        ("llama3", ["model.num_layers=1", "parallel.pipeline=2", *MANY]),
        ("deepseek_v3", ["model.num_layers=2", MOE, "parallel.pipeline=2", *MANY]),
        ("deepseek_v3", ["model.num_layers=4", MOE, "parallel.pipeline=2", "model.mtp_layers=1",
                         *MANY]),
        ("gpt2", ["model.num_layers=3", "parallel.tensor=2", "parallel.sequence=false"]),
        ("gpt2", ["model.num_layers=4", CONTEXT]),
        ("llama3", ["model.num_layers=3", CONTEXT, "model.num_query_groups=2"]),
        ("qwen3", ["model.num_layers=3", CONTEXT]),
        ("mixtral", ["model.num_layers=2", CONTEXT]),
        ("deepseek_v3", ["model.num_layers=3", MOE, CONTEXT]),
        ("qwen3", ["model.num_layers=3", "parallel.tensor=2", *anew("layernorm, mlp")]),
    ],
)  # fmt: skip
def test_prediction_is_within_a_twentieth_under_parallelism(
    pool: Pool, family: str, words: list[str], precision: str
) -> None:
    check(pool, 2, family, [*words, f"train.precision={precision}"])


@pytest.mark.parametrize(
    "words",
    [
        ["parallel.tensor=2", *ANEW["all"]],
        [CONTEXT, "data.sequence_length=256", *ANEW["all"]],
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", *MANY, *ANEW["one layer"]],
    ],
)
def test_whole_layers_computed_anew_under_parallelism(pool: Pool, words: list[str]) -> None:
    """In fp32: in bf16 with RMSNorm written out the prediction is up to 13 % low."""
    check(pool, 2, "llama3", ["model.num_layers=4", *words])


def gpt2(words: list[str]) -> RunConfig:
    return from_dict(
        {"model": {"family": "gpt2", "preset": "7b"}, "train": {"precision": "bf16"}}, words
    )


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("sequence", [False, None])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_gpt_layer_keeps_what_korthikanti_counts_without_dropout_and_scores(
    tensor: int, sequence: bool | None, recompute: str
) -> None:
    """Their equation 2 is s b h (10 + 24 / t + 5 a s / (h t)) bytes in 16 bits: 1 and 1 of the 10
    are dropout masks, and flash attention has not the last term (arXiv 2205.05198, section 4.4
    stores what it recomputes from: queries, keys, values are in the 24). Their equation 4, with
    sequence parallelism, divides all of it by t. A layer that is computed anew keeps its input, 2
    s b h, which sequence parallelism divides."""
    config = gpt2(["train.micro_batch=1", "train.global_batch=8"])
    layout = Layout(8, tensor=tensor, sequence=sequence, recompute=recompute)
    layers = [
        stage_activations(model_shape(config, depth), config, layout, fused=True)[0].kept
        for depth in (10, 11)
    ]
    shape, ranks = model_shape(config), 1 if sequence is False else tensor
    unit = shape.sequence_length * shape.hidden_size
    counted = 8 / ranks + 24 / tensor if recompute == "none" else 2 / ranks
    assert layers[1] - layers[0] == pytest.approx(unit * counted, rel=0.005)


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("batches", [1, 8, 64])
def test_micro_batches_in_flight_are_those_of_a_simulated_schedule(
    stages: int, chunks: int, batches: int
) -> None:
    """1F1B's first stage holds a whole model's worth of one micro-batch; interleaving adds
    (P - 1) / (P v) of it (Korthikanti et al. 2022, section 4.2.3)."""
    layout = Layout(stages, pipeline=stages, virtual_pipeline=chunks)
    held = sum(in_flight(layout, 0, batches)) / chunks  # stages' worth
    factor = 1 if chunks == 1 else 1 + (stages - 1) / (stages * chunks)
    assert held == pytest.approx(min(batches, stages * factor))
    last = sum(in_flight(layout, stages - 1, batches))
    assert last == min(1 + (chunks - 1) * stages, batches * chunks)
