"""What routed tokens cost between nodes, against draws and against counts by hand."""

from __future__ import annotations

import random

import pytest

from megatron_progressive.cost.all_to_all import all_to_all_seconds, nodes_of_a_token
from megatron_progressive.cost.cluster import GPUS
from megatron_progressive.models.base import MoE
from megatron_progressive.runtime.layout import Layout

H800 = GPUS["h800"]
TOKENS = 1e9  # bytes
DEEPSEEK = MoE(256, 8, 2048, num_groups=8, top_k_groups=4)


@pytest.mark.parametrize(("experts", "top_k", "nodes"), [(256, 8, 8), (64, 6, 4), (8, 2, 2)])
def test_nodes_of_a_token_are_those_of_draws(experts: int, top_k: int, nodes: int) -> None:
    rng, each = random.Random(1), experts // nodes
    drawn = [
        len({expert // each for expert in rng.sample(range(experts), top_k)}) for _ in range(4000)
    ]
    expected = sum(drawn) / len(drawn)
    assert nodes_of_a_token(MoE(experts, top_k, 1), nodes) == pytest.approx(expected, rel=0.02)


def test_groups_bound_the_nodes() -> None:
    assert nodes_of_a_token(DEEPSEEK, 8) == 4  # published: at most four nodes
    assert nodes_of_a_token(DEEPSEEK, 16) > 4  # a group lies on two
    assert nodes_of_a_token(DEEPSEEK, 1) == 1
    assert nodes_of_a_token(MoE(8, 8, 1), 2) == 2  # all experts


def test_seconds_are_those_of_the_slower_link() -> None:
    """64 ranks on eight nodes, eight experts a token: a copy stays in the node with 1/8."""
    layout = Layout(128, expert=64)
    plain = all_to_all_seconds(DEEPSEEK, layout, H800, TOKENS, deepep=False)
    # 8 copies: 7 of them to other nodes at 50 GB/s, and one but for the rank's own at 200
    assert plain == pytest.approx(7 / 50 + (1 - 1 / 8) / 200)
    deepep = all_to_all_seconds(DEEPSEEK, layout, H800, TOKENS, deepep=True)
    assert deepep == pytest.approx(4 * 7 / 8 / 50)  # four nodes, of which one in eight is its own
    unlimited = MoE(256, 8, 2048)
    assert deepep < all_to_all_seconds(unlimited, layout, H800, TOKENS, deepep=True) < plain
    # in one node both are NVLink's
    for way in (False, True):
        inside = all_to_all_seconds(DEEPSEEK, Layout(8, expert=8), H800, TOKENS, deepep=way)
        assert inside == pytest.approx(8 * 7 / 8 / 200)


def test_an_expert_on_two_ranks_gets_a_token_twice() -> None:
    one, two = Layout(16, tensor=2, expert=4, expert_tensor=1), Layout(16, tensor=2, expert=4)
    seconds = [all_to_all_seconds(DEEPSEEK, x, H800, TOKENS, deepep=False) for x in (one, two)]
    assert seconds[1] / seconds[0] == pytest.approx(2 * (7 / 8) / (3 / 4))


def test_deepep_needs_one_node_or_whole_ones() -> None:
    able = {ranks: Layout(96, expert=ranks).can_use_deepep for ranks in (1, 2, 8, 12, 16, 24)}
    assert able == {1: False, 2: True, 8: True, 12: False, 16: True, 24: True}
