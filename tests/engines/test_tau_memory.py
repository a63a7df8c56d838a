"""The memory at τ: live bytes of real expansions against the bound and the plan's prediction."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_progressive.cost.memory import largest_rank
from megatron_progressive.cost.tau_memory import tau_peak
from megatron_progressive.models import model_shape
from megatron_progressive.runtime.layout import make_layout
from tests.engines import on_ranks, peaks_on_ranks
from tests.pool import Pool

BOUND = 1.15
SIZES = ["model.hidden_size=64", "model.ffn_hidden_size=256", "data.vocab_size=1000",
         "train.micro_batch=1"]  # fmt: skip
EXPERTS = ["model.moe.num_experts=4", "model.moe.ffn_hidden_size=128"]
MUON, ADAMW = "optim.name=muon_nsgd", "optim.name=adamw"
NONE = "model.num_layers=0"
FP32, BF16 = "train.precision=fp32", "train.precision=bf16"


def deepspeed(stage: int) -> list[str]:
    return ["parallel.engine=deepspeed", f"parallel.zero_stage={stage}"]


CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "tensor": ("gpt2", [ADAMW, FP32], {"tensor": 2}),
    "whole to tensor": ("llama3", [MUON, BF16, "parallel.zero_stage=0"], {"tensor": 2}),
    "tensor to data": ("llama3", [ADAMW, BF16, "parallel.tensor=2"], {"tensor": 1}),
    "virtual stages": ("gpt2", [MUON, FP32, "parallel.pipeline=2"], {"virtual_pipeline": 2}),
    "experts": ("deepseek_v3", [MUON, FP32, "parallel.expert=2", *EXPERTS], {"expert": 1}),
    "no layers before": ("llama3", [MUON, BF16, NONE], {"tensor": 2}),
    "the same": ("gpt2", [MUON, BF16], {}),
    "context": ("gpt2", [MUON, FP32], {"context": 2}),
    "ZeRO 2": ("gpt2", [ADAMW, FP32, *deepspeed(2)], {}),
    "ZeRO 1 to 3": ("llama3", [MUON, BF16, *deepspeed(1)], {"zero_stage": 3}),
    "ZeRO 3 to Megatron": ("gpt2", [MUON, FP32, *deepspeed(3)],
                           {"engine": "megatron", "zero_stage": 1, "tensor": 2}),
    "Megatron to ZeRO 1": ("gpt2", [ADAMW, BF16], {"engine": "deepspeed"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_peak_at_tau_is_bounded_and_as_planned(pool: Pool, case: str) -> None:
    """Old and new states are of one size here, or nearly, which is the worst case, but for one."""
    family, words, after = CASES[case]
    grown: dict[str, Any] = {"to_layers": 4, "init": "copying", "optimizer_state": "copy"}
    if NONE in words:
        grown = {"to_layers": 2, "init": "random"}
    expansion = {"at": 2, "parallel": after, **grown}
    config = on_ranks.family_config(family, [*SIZES, "model.num_layers=3", *words], expansion)
    states = [
        largest_rank(model_shape(config, depth), config, make_layout(config.parallel_after(i), 2))
        for i, depth in enumerate((None, grown["to_layers"]))
    ]
    larger = max(state.total for state in states)
    before, after_, peak = (
        max(found) for found in zip(*pool.run(2, peaks_on_ranks.peak_at_tau, config), strict=True)
    )
    assert peak <= BOUND * larger
    assert before + after_ > 1.3 * peak  # both at once would be far more
    assert tau_peak(config, 0, 2, peaks_on_ranks.STAGED) == pytest.approx(peak, rel=0.05)
