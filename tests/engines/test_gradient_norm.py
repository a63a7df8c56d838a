"""The norm of gradients and their clipping, against Megatron-core's own."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_progressive.engines.megatron import engine as megatron
from megatron_progressive.engines.megatron.optimizer import clip_gradients, norm_of
from tests.engines.on_ranks import family_config, start, step
from tests.pool import Pool


def norms_and_gradients(words: list[str], family: str) -> list[tuple[float, float, bool]]:
    """Of some steps, one clipped and one not: our norm, Megatron-core's, and whether all gradients
    have the bits of its."""
    seen: list[tuple[float, float, bool]] = []

    def both(optimizer: Any, most: float) -> Any:
        norm = float(optimizer.get_grad_norm())
        parameters = [p for one in optimizer.chained_optimizers for p in one.get_parameters()]
        held = [p for p in parameters if p.grad is not None]
        before = [p.grad.clone() for p in held]
        for most in (norm / 3, 2 * norm):
            for parameter, gradient in zip(held, before, strict=True):
                parameter.grad.copy_(gradient)
            if held:
                clip_grad_by_total_norm_fp32(held, most, norm)
            expected = [p.grad.clone() for p in held]
            for parameter, gradient in zip(held, before, strict=True):
                parameter.grad.copy_(gradient)
            squares = clip_gradients(optimizer, most)
            same = all(torch.equal(p.grad, e) for p, e in zip(held, expected, strict=True))
            seen.append((norm_of([float(s) for s in squares]), norm, same))
        return squares

    engine = start(family_config(family, words))
    with patch.object(megatron, "clip_gradients", both):
        for number in range(3):
            metrics = step(engine, number)
    engine.close()
    assert metrics > 0
    return seen


@pytest.mark.parametrize(
    ("family", "world", "words"),
    [
        ("gpt2", 1, []),
        ("gpt2", 2, ["train.precision=bf16"]),
        ("llama3", 4, ["parallel.tensor=2", "optim.name=adamw"]),
        ("gpt2", 4, ["parallel.pipeline=4", "parallel.zero_stage=0"]),
        ("mixtral", 4, ["parallel.expert=2", "parallel.zero_stage=0"]),
        ("deepseek_v3", 4, ["parallel.expert=2", "parallel.tensor=2", "optim.name=adamw"]),
    ],
)
def test_norm_and_clipping_have_the_bits_of_megatron_cores(
    pool: Pool, family: str, world: int, words: list[str]
) -> None:
    words = ["model.num_layers=2", "train.micro_batch=1", *words]
    ranks = pool.run(world, norms_and_gradients, words, family)
    for seen in ranks:
        assert len(seen) == 6
        assert [ours for ours, _, _ in seen] == [theirs for _, theirs, _ in seen]
        assert all(same for _, _, same in seen)
    assert len({tuple(ours for ours, _, _ in seen) for seen in ranks}) == 1
