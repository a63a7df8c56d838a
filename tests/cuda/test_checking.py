"""``checking`` refuses what a GPU would not forgive: every planted error, with its line."""

from __future__ import annotations

import math

import pytest

from tests.cuda import planted
from tests.cuda.on_device import losses_through_an_expansion
from tests.cuda.serve import PoolOnDevice
from tests.engines.on_ranks import family_config

_FREED = "use of device memory after it was freed"
_UNFINISHED = "has not finished writing"
PLANTED: dict[str, str] = {
    "cpu_tensor_to_nccl": "was handed a CPU tensor, and NCCL takes none",
    "tensors_of_two_devices": "tensors of two devices: cuda:0 and cuda:1",
    "tensors_of_host_and_device": "tensors of two devices: cpu and cuda:0",
    "index_of_another_device": "tensors of two devices: cuda:0 and cuda:1",
    "sizes_differ": "collectives differ: ",
    "types_differ": "collectives differ: ",
    "collectives_differ": "collectives differ: ",
    "rank_leaves": "rank 1 has left the communicator",
    "rank_is_elsewhere": "deadlock: ",
    "swapped_sends": "deadlock: ",
    "receive_first": "deadlock: ",
    "message_of_another_size": "ncclRecv of 20 bytes from 0, which sent 16",
    "freed_and_read": _FREED,
    "freed_and_written": _FREED,
    "freed_and_copied_to_the_host": _FREED,
    "freed_and_sent": _FREED,
    "read_before_written": _UNFINISHED,
    "side_stream_does_not_wait": _UNFINISHED,
    "collective_not_waited_for": _UNFINISHED,
    "overwritten_while_sent": _UNFINISHED,
    "all_in_order": "",
}
"""By the function of :mod:`tests.cuda.planted`: a part of the refusal."""


@pytest.fixture(scope="module")
def refusals(checking_pool: PoolOnDevice) -> dict[str, list[str]]:
    """What each planted error raised, by rank."""
    by_rank = checking_pool.run(2, planted.refusals, list(PLANTED))
    return {name: [lines[i] for lines in by_rank] for i, name in enumerate(PLANTED)}


@pytest.mark.parametrize("name", [name for name, line in PLANTED.items() if line])
def test_planted_error_is_refused(refusals: dict[str, list[str]], name: str) -> None:
    assert any(PLANTED[name] in line for line in refusals[name]), refusals[name]


def test_what_is_in_order_is_not_refused(refusals: dict[str, list[str]]) -> None:
    assert refusals["all_in_order"] == ["", ""]


FULL = pytest.mark.cuda_full


@pytest.mark.parametrize(
    ("family", "words", "after"),
    [
        ("gpt2", ["parallel.pipeline=2", "optim.name=adamw"], {"tensor": 2}),
        ("llama3", ["parallel.tensor=2"], {"pipeline": 2, "virtual_pipeline": 2}),
        pytest.param("gpt2", ["optim.name=adamw"], {"tensor": 2}, marks=FULL),
        pytest.param("mixtral", ["parallel.expert=2"], {"tensor": 2}, marks=FULL),
        pytest.param("deepseek_v3", ["optim.name=adamw"], {"expert": 2}, marks=FULL),
    ],
)
def test_engines_are_not_refused(
    checking_pool: PoolOnDevice, family: str, words: list[str], after: dict[str, int]
) -> None:
    """Steps, an expansion with another layout, and steps again."""
    layout = {"tensor": 1, "pipeline": 1, "expert": 1, **after}
    expansion = {"at": 10, "to_layers": 4, "init": "copying", "parallel": layout}
    config = family_config(
        family, ["model.num_layers=2", "train.precision=bf16", *words], expansion
    )
    for losses in checking_pool.run(2, losses_through_an_expansion, config):
        assert all(math.isfinite(loss) for loss in losses)
