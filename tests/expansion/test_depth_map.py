"""The depth map by its published patterns."""

from __future__ import annotations

import pytest

from megatron_progressive.expansion.depth_map import depth_map, source_layers, survivors
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import ModelShape

SHAPE = ModelShape("gpt2", 6, 16, 2, 64, 100, 8, True, True)


def test_orders_are_abab_aabb_abbb() -> None:
    assert source_layers(2, 6, "stack") == [0, 1, 0, 1, 0, 1]
    assert source_layers(2, 6, "inter") == [0, 0, 0, 1, 1, 1]
    assert source_layers(2, 6, "last") == [0, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="source layer"):
        source_layers(0, 6, "stack")


def test_random_layers_go_to_the_bottom_or_the_top() -> None:
    assert survivors(2, 6, "stack", "bottom", copied=False) == [4, 5]
    assert survivors(2, 6, "stack", "top", copied=False) == [0, 1]


def test_survivors_of_copies_are_their_last_or_first_copy() -> None:
    assert survivors(2, 6, "stack", "bottom", copied=True) == [4, 5]
    assert survivors(2, 6, "stack", "top", copied=True) == [0, 1]
    assert survivors(2, 6, "inter", "bottom", copied=True) == [2, 5]


def test_zero_variants_zero_what_their_names_say_and_only_in_new_layers() -> None:
    table = tensor_table(SHAPE)
    rules = depth_map(table, 1, 6, "copying_zeroL")
    zeroed = {name for name, rule in rules.items() if rule.weights == "zero"}
    ends = ("linear_proj.weight", "linear_proj.bias", "linear_fc2.weight", "linear_fc2.bias")
    assert zeroed == {n for n in table if n.endswith(ends) and ".layers.5." not in n}
    rules = depth_map(table, 1, 6, "copying_zeroN", insert="top")
    zeroed = {name for name, rule in rules.items() if rule.weights == "zero"}
    assert zeroed == {n for n in table if ".layers." in n and "layernorm" in n and ".0." not in n}
    assert all(rule.weights == "copy" for n, rule in rules.items() if ".layers." not in n)


def test_optimizer_state_policies() -> None:
    table = tensor_table(SHAPE)
    new = "decoder.layers.0.mlp.linear_fc1.weight"
    old = "decoder.layers.5.mlp.linear_fc1.weight"
    head = "embedding.word_embeddings.weight"
    for policy, states in {
        "inherit": ("zero", "copy", "copy"),
        "copy": ("copy", "copy", "copy"),
        "reset": ("zero", "zero", "zero"),
    }.items():
        rules = depth_map(table, 1, 6, "copying", optimizer_state=policy)
        assert (rules[new].state, rules[old].state, rules[head].state) == states
