"""FLOPs against independent counts: torch's counter on Hugging Face's GPT-2 and plain loops."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_progressive.config import RunConfig, from_dict
from megatron_progressive.cost import flops
from megatron_progressive.models import model_shape, parameter_count
from megatron_progressive.optim.newton_schulz import newton_schulz
from tests.cost import counts_on_ranks
from tests.engines.on_ranks import family_config
from tests.pool import Pool


def run_config(**sections: Any) -> RunConfig:
    return from_dict({"model": {"family": "gpt2"}, **sections})


def small(
    layers: int, hidden: int, heads: int, sequence: int, vocab: int, **model: Any
) -> RunConfig:
    return run_config(
        model={
            "family": "gpt2", "num_layers": layers, "hidden_size": hidden,
            "num_attention_heads": heads, **model,
        },
        data={"vocab_size": vocab, "sequence_length": sequence},
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "sequence", "vocab"),
    [(0, 64, 4, 64, 512), (1, 64, 4, 128, 512), (3, 96, 6, 32, 256), (2, 32, 2, 256, 128)],
)
def test_model_flops_equal_torchs_count_of_hugging_faces_gpt2(
    attention: str, layers: int, hidden: int, heads: int, sequence: int, vocab: int
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = small(layers, hidden, heads, sequence, vocab)
    shape = model_shape(config)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=layers, n_embd=hidden, n_head=heads, n_positions=sequence, vocab_size=vocab,
            bos_token_id=0, eos_token_id=0, attn_implementation=attention,
        )
    )  # fmt: skip
    samples = 2
    tokens = torch.randint(0, vocab, (samples, sequence))
    with FlopCounterMode(display=False) as forward:
        model(tokens)
    with FlopCounterMode(display=False) as both:
        model(tokens).logits.sum().backward()
    ours = flops.forward_flops_per_token(shape) * tokens.numel()
    assert ours == pytest.approx(forward.get_total_flops(), rel=0.01)
    adamw = run_config(train={"global_batch": samples}, optim={"name": "adamw"})
    assert flops.step_flops(shape, adamw) == pytest.approx(both.get_total_flops(), rel=0.01)


def test_untied_head_costs_the_same_and_counts_once() -> None:
    tied, untied = (
        model_shape(small(2, 64, 4, 64, 512, tie_embeddings=tie)) for tie in (True, False)
    )
    assert flops.forward_flops_per_token(tied) == flops.forward_flops_per_token(untied)


@pytest.mark.parametrize(("n_out", "n_in"), [(64, 64), (256, 48), (48, 256)])
def test_newton_schulz_flops_equal_torchs_count(n_out: int, n_in: int) -> None:
    matrix = torch.randn(n_out, n_in)
    with FlopCounterMode(display=False) as counter:
        newton_schulz(matrix, steps=4)
    assert flops.newton_schulz_flops(n_out, n_in, 4) == counter.get_total_flops()


def test_optimizer_flops_are_those_of_a_plain_loop_over_matrices() -> None:
    h, ffn, vocab, sequence = 64, 256, 512, 32
    config = small(2, h, 4, sequence, vocab)
    shapes = 2 * [(h, h), (h, h), (h, h), (h, h), (ffn, h), (h, ffn)]  # Q, K, V, projection, MLP
    shapes += [(vocab, h), (sequence, h)]
    with FlopCounterMode(display=False) as counter:
        for n_out, n_in in shapes:
            x = torch.randn(min(n_out, n_in), max(n_out, n_in))
            for _ in range(5):
                gram = x @ x.T
                x = (gram @ gram) @ x
    assert flops.optimizer_flops(model_shape(config), config.optim) == counter.get_total_flops()


def test_phases_cover_each_step_once_and_sum_to_the_total() -> None:
    config = run_config(
        model={"family": "gpt2", "num_layers": 0},
        train={"steps": 100},
        expansion=[{"at": 0.25, "to_layers": 2}, {"at": 70, "to_layers": 5}],
    )
    phases = flops.phases(config)
    assert [(p.first_step, p.last_step, p.num_layers) for p in phases] == [
        (1, 25, 0), (26, 70, 2), (71, 100, 5),
    ]  # fmt: skip
    per_step = [
        flops.step_flops(model_shape(config, 0 if s <= 25 else 2 if s <= 70 else 5), config)
        for s in range(1, 101)
    ]
    assert flops.total_flops(config) == sum(per_step)
    assert [p.params for p in phases] == [
        parameter_count(model_shape(config, d)) for d in (0, 2, 5)
    ]


def test_124m_step_is_about_six_flops_a_parameter_and_token() -> None:
    """6 N D with attention: PaLM's formula (arXiv 2204.02311, appendix B) on GPT-2 124M."""
    config = run_config(model={"family": "gpt2", "preset": "124m"}, optim={"name": "adamw"})
    shape = model_shape(config)
    weights = parameter_count(shape) - shape.sequence_length * shape.hidden_size
    palm = 6 * weights + 12 * shape.num_layers * shape.hidden_size * shape.sequence_length
    ours = flops.step_flops(shape, config) / flops.step_tokens(shape, config)
    assert ours == pytest.approx(palm, rel=0.002)  # norms and biases are in N only


@pytest.mark.parametrize("optimizer", ["adamw", "muon_nsgd"])
@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3", "mixtral", "deepseek_v3"])
def test_a_step_of_the_engine_has_the_predicted_flops(
    pool: Pool, family: str, optimizer: str
) -> None:
    """Forward, backward and optimizer of Megatron-core's own model, on one rank."""
    words = [f"optim.name={optimizer}", "model.num_layers=2"]
    config = family_config(family, words)
    predicted = flops.step_flops(model_shape(config), config)
    assert predicted == pytest.approx(pool.run(1, counts_on_ranks.step_flops, config)[0], rel=0.01)


@pytest.mark.parametrize("at", [[0.5], [0.05], [0.97], [0.3, 0.7]])
def test_steps_within_a_budget(at: list[float]) -> None:
    """The greatest number of steps, for every budget: one more would cost more."""
    config = small(2, 32, 2, 16, 128)
    depths = [4, 8][-len(at) :]
    expansion = [{"at": a, "to_layers": d} for a, d in zip(at, depths, strict=True)]
    values = {**asdict(config), "expansion": expansion}
    config = from_dict(values, resolved=True)
    costs = [flops.total_flops(_of_steps(config, steps)) for steps in range(1, 200)]
    assert costs == sorted(costs)
    for budget in (*costs[::7], *(cost + 1 for cost in costs[::11]), *(c - 1 for c in costs[::13])):
        steps = flops.steps_within(config, budget)
        assert steps == sum(cost <= budget for cost in costs)
    assert flops.steps_within(_of_steps(config, 5, stop_after=3), costs[40]) == 41


def _of_steps(config: RunConfig, steps: int, stop_after: int | None = None) -> RunConfig:
    return replace(config, train=replace(config.train, steps=steps, stop_after=stop_after))
