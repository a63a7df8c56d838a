"""Which ranks form a group on nodes of eight GPUs, as Megatron-core makes the groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe import fused_a2a
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_progressive.runtime.groups import ProcessGroups
from megatron_progressive.runtime.layout import Layout

NODE = 8
Groups = dict[str, list[list[int]]]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Groups]:
    """The ranks of all groups that are made, by Megatron-core's description of them."""
    found: Groups = defaultdict(list)
    create = parallel_state.create_group

    def noted(ranks: list[int], *args: Any, group_desc: str = "", **kwargs: Any) -> Any:
        found[group_desc].append(list(ranks))
        return create(ranks, *args, group_desc=group_desc, **kwargs)

    monkeypatch.setattr(parallel_state, "create_group", noted)
    yield found
    if dist.is_initialized():
        dist.destroy_process_group()


def nodes(ranks: list[int]) -> int:
    return len({rank // NODE for rank in ranks})


@pytest.mark.parametrize(
    "layout",
    [
        Layout(16, expert=8),
        Layout(16, tensor=2, expert=4, expert_tensor=1),
        Layout(16, tensor=4, expert=4),
        Layout(32, tensor=8, expert=16, expert_tensor=2),
        Layout(32, tensor=2, pipeline=2, expert=16, expert_tensor=1),
        Layout(64, pipeline=4, expert=16),
        Layout(64, pipeline=2, expert=4),
    ],
    ids=str,
)
def test_experts_lie_on_the_fewest_nodes(made: Groups, layout: Layout) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world)
    groups = ProcessGroups(layout)
    experts = made["EXPERT_MODEL_PARALLEL_GROUP"]
    assert sorted(rank for ranks in experts for rank in ranks) == list(range(layout.world))
    sizes = {
        "TENSOR_MODEL_PARALLEL_GROUP": layout.tensor,
        "EXPERT_MODEL_PARALLEL_GROUP": layout.expert,
        "EXPERT_TENSOR_PARALLEL_GROUP": layout.expert_tensor,
        "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": layout.expert * layout.expert_tensor,
    }
    for name, size in sizes.items():
        assert made[name], name
        for ranks in made[name]:
            assert len(ranks) == size
            # an expert-parallel group is cut from one with its expert-tensor-parallel ranks
            neighbours = size * layout.expert_tensor if name.startswith("EXPERT_MODEL") else size
            assert nodes(ranks) == -(-neighbours // NODE), (name, ranks)
    fused_a2a._buffer = groups  # DeepEP's is of a group that is gone then
    groups.close()
    assert fused_a2a._buffer is None
