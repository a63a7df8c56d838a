"""muP's table: each tensor's initial size and the size of its update, by rule, width and depth."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_progressive.config import OptimSection
from megatron_progressive.models import model_shape, tensor_table
from megatron_progressive.models.base import TensorSpec
from megatron_progressive.models.mup import FORMS, INNER, LAST, OUTSIDE, place_of
from megatron_progressive.optim.flat import Cut, FlatOptimizer
from megatron_progressive.optim.lr_factor import ADAMW_WIDTH, lr_factor
from megatron_progressive.reshard.boxes import whole
from megatron_progressive.reshard.initial_values import initial_values
from tests.engines.on_ranks import family_config, losses_and_norms
from tests.pool import Pool

FAMILIES = ["gpt2", "llama3", "qwen3", "mixtral", "deepseek_v3"]


def table(family: str, layers: int, *words: str) -> dict[str, TensorSpec]:
    return tensor_table(model_shape(family_config(family, ["model.mup=true", *words]), layers))


def moved(spec: TensorSpec, optim: OptimSection) -> torch.Tensor:
    """What one step of the optimizer at a learning rate of 1 subtracts from a tensor."""
    weight = torch.zeros(spec.shape)
    optimizer = FlatOptimizer([weight], replace(optim, lr=1.0, weight_decay=0.0))  # type: ignore[list-item]
    optimizer.attach(weight, weight, [Cut("", spec, {0: (0, weight.numel())})])
    weight.grad = torch.randn(spec.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    return weight


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [1, 4])
def test_updates_have_the_size_of_the_table(family: str, layers: int) -> None:
    """Rows and vectors: RMS; matrices: sqrt(n_in / n_out) times the spectral norm."""
    optim = OptimSection(ns_coefficients="deepseek_v4", nesterov=False)
    for name, spec in table(family, layers, "model.tie_embeddings=true").items():
        if not spec.trainable or spec.expert not in (None, 0):
            continue
        assert spec.scaling is not None, name
        update = moved(spec, optim)
        place, gain = place_of(name, spec), 1.0
        if name.endswith(("final_layernorm.weight", "final_layernorm.bias")):
            gain = 32**-0.5
        expected = gain / (2 * layers) if place == LAST else gain
        if FORMS[spec.role] == "matrix":
            for matrix in update.view(-1, *spec.shape[-2:]):
                n_out, n_in = matrix.shape
                if spec.row_blocks:
                    continue  # several matrices
                norm = float(torch.linalg.matrix_norm(matrix, 2)) * math.sqrt(n_in / n_out)
                assert norm == pytest.approx(expected, rel=0.02), name
        else:
            assert float(update.square().mean().sqrt()) == pytest.approx(expected, rel=0.02), name


@pytest.mark.parametrize("tied", ["true", "false"])
def test_initial_sizes_do_not_know_the_width(tied: str) -> None:
    for width in (64, 256):
        words = [f"model.hidden_size={width}", f"model.tie_embeddings={tied}"]
        specs = table("gpt2", 4, *words, "model.ffn_hidden_size=null", "data.vocab_size=1024")
        drawn = {
            name: initial_values(1, 0, name, spec, whole(spec.shape))
            for name, spec in specs.items()
        }
        embedding = drawn["embedding.word_embeddings.weight"]
        assert float(embedding.std()) == pytest.approx(0.25, rel=0.02)
        for name in ("linear_qkv", "linear_proj"):
            matrix = drawn[f"decoder.layers.0.self_attention.{name}.weight"]
            norm = float(torch.linalg.matrix_norm(matrix, 2))
            target = math.sqrt(matrix.size(0) / matrix.size(1))
            depth = 8 if name == "linear_proj" else 1
            assert norm * depth == pytest.approx(target, rel=0.1)
        gain = drawn["decoder.final_layernorm.weight"]
        assert torch.equal(gain, torch.full((width,), width**-0.5 if tied == "true" else 1.0))
        head = embedding if tied == "true" else drawn["output_layer.weight"]
        logits = (torch.randn(width) * gain) @ head.T
        assert 0.1 < float(logits.std()) < 1.2


def test_every_role_has_one_place_in_the_table() -> None:
    places = {
        (place_of(name, spec), spec.role)
        for family in FAMILIES
        for name, spec in table(family, 2, "model.tie_embeddings=false").items()
        if spec.trainable
    }
    assert {role for _, role in places} <= FORMS.keys()
    assert {role for place, role in places if place == LAST} == {"proj", "fc2", "bias"}
    assert {"embedding", "position", "head"} <= {role for p, role in places if p == OUTSIDE}
    assert {"qkv", "fc1", "router", "norm_gain"} <= {role for p, role in places if p == INNER}


def test_adamw_has_the_plain_rate_at_its_width() -> None:
    optim = OptimSection(name="adamw")
    words = ["model.ffn_hidden_size=null", "model.tie_embeddings=false"]
    for width in (ADAMW_WIDTH, 4 * ADAMW_WIDTH):
        specs = table("gpt2", 3, *words, f"model.hidden_size={width}")
        layer = "decoder.layers.1."
        assert lr_factor(specs["embedding.word_embeddings.weight"], optim) == 1
        assert lr_factor(specs["output_layer.weight"], optim) == ADAMW_WIDTH / width
        assert lr_factor(specs[layer + "mlp.linear_fc1.weight"], optim) == ADAMW_WIDTH / width
        fc2 = lr_factor(specs[layer + "mlp.linear_fc2.weight"], optim)
        assert fc2 == pytest.approx(ADAMW_WIDTH / (4 * width) / 6)


def test_without_mup_nothing_is_scaled() -> None:
    config = family_config("gpt2", [])
    for spec in tensor_table(model_shape(config, 3)).values():
        assert (spec.scaling, spec.gain, lr_factor(spec, config.optim)) == (None, 1.0, 1.0)


def test_new_layers_take_the_targets_depth() -> None:
    """Without layers there is nothing to scale; the target's table gives the factors from τ on."""
    assert not any("layers" in name for name in table("gpt2", 0))
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    shallow, deep = table("gpt2", 1)[name], table("gpt2", 6)[name]
    assert deep.std == pytest.approx(shallow.std / 6)
    assert lr_factor(deep, OptimSection()) == pytest.approx(lr_factor(shallow, OptimSection()) / 6)


@pytest.mark.parametrize("optimizer", ["muon_nsgd", "adamw"])
def test_losses_do_not_know_the_layout_or_the_engine(pool: Pool, optimizer: str) -> None:
    words = ["model.mup=true", f"optim.name={optimizer}"]
    configs = {
        "one rank": (1, words),
        "tensor": (2, [*words, "parallel.tensor=2"]),
        "deepspeed": (2, [*words, "parallel.engine=deepspeed", "parallel.zero_stage=2"]),
    }
    losses = {
        name: pool.run(ranks, losses_and_norms, family_config("gpt2", given), 2, 4)[0]
        for name, (ranks, given) in configs.items()
    }
    alone = [loss for loss, _ in losses["one rank"]]
    for name, found in losses.items():
        assert [loss for loss, _ in found] == pytest.approx(alone, rel=2e-5), name
    plain = family_config("gpt2", [f"optim.name={optimizer}"])
    without = pool.run(1, losses_and_norms, plain, 2, 4)[0]
    assert without[3][0] != pytest.approx(alone[3], rel=1e-3)
