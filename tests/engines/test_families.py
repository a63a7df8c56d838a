"""Every family's engine on real gloo ranks: gradients on every layout, checkpoints, experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_progressive.config import RunConfig
from megatron_progressive.models import model_shape
from tests.engines import on_ranks
from tests.pool import Pool

TP, PP, EP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"
CP = "parallel.context=2"
ALL, PARTS = "parallel.recompute=full", "parallel.recompute=selective"
DENSE_LAYOUTS = {
    "dp2": (2, []),
    "tp2": (2, [TP]),
    "pp2": (2, [PP]),
    "tp2_pp2": (4, [TP, PP]),
    "cp2": (2, [CP]),
    "cp2_tp2": (4, [CP, TP]),
    "cp2_anew": (2, [CP, ALL]),
    "tp2_anew": (2, [TP, ALL]),
    "tp2_parts_anew": (2, [TP, PARTS]),
}
EXPERT_LAYOUTS = {
    "ep2": (2, [EP]),
    "ep2_tp2": (4, [EP, TP]),
    "ep2_tp2_etp1": (4, [EP, TP, "parallel.expert_tensor=1"]),
    "ep2_pp2": (4, [EP, PP]),
    "ep2_cp2": (2, [EP, CP]),
    "ep2_cp2_tp2": (4, [EP, CP, TP]),
    "ep2_of_dp4": (4, [EP]),
    "ep2_tp2_anew": (4, [EP, TP, ALL]),
    "ep2_parts_anew": (2, [EP, PARTS]),
}
VARIANTS = [
    ("llama3", []),
    ("qwen3", ["model.tie_embeddings=false"]),
    ("mixtral", []),
    ("deepseek_v3", ["model.mtp_layers=1"]),
    ("deepseek_v3", ["model.mla.q_lora_rank=0", "model.moe.num_groups=1"]),
    ("deepseek_v3", ["model.moe.first_k_dense=9", "model.rope.scaling=yarn",
                     "model.rope.factor=4", "model.rope.original_length=8"]),
]  # fmt: skip


def momentum_after_a_step(config: RunConfig, layers: int) -> on_ranks.Full:
    """In proportion to the gradient: an update may hide a wrong factor, as NSGD's does."""
    engine = on_ranks.start(config, layers)
    on_ranks.step(engine, 0)
    state = on_ranks.gather(engine.state())
    engine.close()
    return {key: value for key, value in state.items() if key[1] == "momentum"}


@pytest.mark.parametrize(("family", "parts"), VARIANTS)
def test_every_gradient_is_the_same_on_every_layout(
    pool: Pool, family: str, parts: list[str]
) -> None:
    words = ["train.micro_batch=1", *parts]
    expected = pool.run(1, momentum_after_a_step, on_ranks.family_config(family, words), 3)[0]
    experts = family in ("mixtral", "deepseek_v3") and "model.moe.first_k_dense=9" not in parts
    for name, (world, layout) in {**DENSE_LAYOUTS, **(EXPERT_LAYOUTS if experts else {})}.items():
        config = on_ranks.family_config(family, [*words, *layout])
        if PARTS in layout:  # all that need no grouped experts
            every = model_shape(config, 3).recomputable() - {"moe_act"}
            modules = f"parallel.recompute_modules=[{', '.join(sorted(every))}]"
            config = on_ranks.family_config(family, [*words, *layout, modules])
        found = pool.run(world, momentum_after_a_step, config, 3)[0]
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            difference = (found[key] - gradient).norm() / gradient.norm().clamp_min(1e-12)
            assert difference < 1e-4, (name, key, float(difference))


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "bf16"), ("muon_nsgd", "fp32")])
def test_checkpoint_onto_and_from_expert_parallelism(
    pool: Pool, tmp_path: Path, optimizer: str, precision: str
) -> None:
    base = [f"optim.name={optimizer}", f"train.precision={precision}", "train.micro_batch=1",
            "model.mtp_layers=1", "model.num_layers=3"]  # fmt: skip
    plain = on_ranks.family_config("deepseek_v3", [*base, PP])
    spread = on_ranks.family_config("deepseek_v3", [*base, EP, TP])
    for name, source, target in (("onto", plain, spread), ("from", spread, plain)):
        saved, loaded = pool.run(4, on_ranks.saved_and_loaded, source, target, tmp_path / name)[0]
        assert set(saved) == set(loaded)
        assert [key for key in saved if not torch.equal(saved[key], loaded[key])] == []
        biases = [value for (name, _), value in saved.items() if name.endswith("expert_bias")]
        assert len(biases) == 3  # of two layers and the prediction module's
        assert all(bias.dtype == torch.float32 for bias in biases)
        largest = max(float(bias.abs().max()) for bias in biases)
        assert largest in (pytest.approx(0.001, rel=1e-6), pytest.approx(0.002, rel=1e-6))


def test_padding_of_the_vocabulary_takes_no_part(pool: Pool) -> None:
    """250 tokens are padded to 256: the loss is that of 250, and padded rows stay zero."""
    config = on_ranks.family_config("llama3", [])
    loss, rows = pool.run(2, first_loss_and_padding, config)[0]
    assert loss == pytest.approx(float(torch.tensor(250.0).log()), rel=5e-3)
    assert rows.abs().max() == 0


def first_loss_and_padding(config: RunConfig) -> tuple[float, torch.Tensor]:
    """Loss of a model whose head is zero, and what three steps make of the padding's rows."""
    engine = on_ranks.start(config, 1)
    for piece in engine.state().pieces:
        if piece.name == "embedding.word_embeddings.weight":
            piece.data.mul_(1e-4)
    engine.loaded()
    loss = on_ranks.step(engine, 0)
    on_ranks.step(engine, 1)
    on_ranks.step(engine, 2)
    rows = on_ranks.gather(engine.state())["embedding.word_embeddings.weight", "param"][250:]
    engine.close()
    return loss, rows
