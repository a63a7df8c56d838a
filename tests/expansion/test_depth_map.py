"""The depth map by its published patterns."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from megatron_progressive.config import from_dict
from megatron_progressive.expansion.depth_map import depth_map, new_tensors
from megatron_progressive.expansion.placing import middle_block, source_layers, survivors
from megatron_progressive.models import model_shape, tensor_table

SHAPE = model_shape(from_dict({"model": {"family": "gpt2", "num_layers": 6}}))
ONE = replace(SHAPE, num_layers=1)
DENSE, MOE = ["dense"], ["moe"]


def test_orders_are_abab_aabb_abbb() -> None:
    assert source_layers(DENSE * 2, DENSE * 6, "stack") == [0, 1, 0, 1, 0, 1]
    assert source_layers(DENSE * 2, DENSE * 6, "inter") == [0, 0, 0, 1, 1, 1]
    assert source_layers(DENSE * 2, DENSE * 6, "last") == [0, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="source layer"):
        source_layers([], DENSE * 6, "stack")


def test_random_layers_go_to_the_bottom_or_the_top() -> None:
    assert survivors(DENSE * 2, DENSE * 6, "stack", "bottom", copied=False) == [4, 5]
    assert survivors(DENSE * 2, DENSE * 6, "stack", "top", copied=False) == [0, 1]


def test_survivors_of_copies_are_their_last_or_first_copy() -> None:
    assert survivors(DENSE * 2, DENSE * 6, "stack", "bottom", copied=True) == [4, 5]
    assert survivors(DENSE * 2, DENSE * 6, "stack", "top", copied=True) == [0, 1]
    assert survivors(DENSE * 2, DENSE * 6, "inter", "bottom", copied=True) == [2, 5]


def test_survivors_keep_their_order() -> None:
    """Three layers stacked to four are A B C A: the last copies of them, B C A, would change
    places, and with them what the model computes where new layers do nothing."""
    assert survivors(DENSE * 3, DENSE * 4, "stack", "bottom", copied=True) == [0, 1, 2]
    assert survivors(DENSE * 3, DENSE * 8, "stack", "bottom", copied=True) == [3, 4, 5]
    for trained, grown in itertools.product(range(1, 7), range(1, 15)):
        if grown < trained:
            continue
        for order, insert in itertools.product(["stack", "inter", "last"],
                                               ["bottom", "top", "middle"]):  # fmt: skip
            origins = source_layers(DENSE * trained, DENSE * grown, order, insert)
            for copied in (True, False):
                kinds = DENSE * trained, DENSE * grown
                alive = survivors(*kinds, order, insert, copied)
                assert alive == sorted(set(alive))
                if copied:
                    assert [origins[place] for place in alive] == list(range(trained))


def test_the_middle_is_copied_in_whole_copies_between_the_outer_layers() -> None:
    # arXiv 2609.19107: 11 to 17, 12 to 18 and 14 to 22 layers with a copied middle block
    assert [middle_block(11, 6), middle_block(12, 6), middle_block(14, 8)] == [
        (2, 8), (3, 9), (3, 11),
    ]  # fmt: skip
    assert source_layers(DENSE * 11, DENSE * 17, "stack", "middle") == [
        *range(8), *range(2, 8), 8, 9, 10,
    ]  # fmt: skip
    assert source_layers(DENSE * 4, DENSE * 8, "stack", "middle") == [0, 1, 2, 1, 2, 1, 2, 3]
    assert source_layers(DENSE * 4, DENSE * 8, "inter", "middle") == [0, 1, 1, 1, 2, 2, 2, 3]
    assert survivors(DENSE * 4, DENSE * 8, "stack", "middle", copied=True) == [0, 1, 2, 7]
    # too few for outer layers: all are copied
    assert source_layers(DENSE * 2, DENSE * 4, "stack", "middle") == [0, 1, 0, 1]
    assert source_layers(DENSE, DENSE * 3, "stack", "middle") == [0, 0, 0]
    # layers that are not copied: between the lower and the upper half, at the bottom of one
    assert survivors(DENSE * 3, DENSE * 5, "stack", "middle", copied=False) == [0, 3, 4]
    assert survivors(DENSE, DENSE * 5, "stack", "middle", copied=False) == [4]


def test_a_block_is_copied_and_the_layers_beside_it_stay_single() -> None:
    def origins(order: str, block: tuple[int, int]) -> list[int]:
        return source_layers(DENSE * 4, DENSE * 7, order, block=block)

    assert origins("stack", (1, 3)) == [0, 1, 2, 1, 2, 1, 3]
    assert origins("inter", (1, 3)) == [0, 1, 1, 1, 2, 2, 3]
    assert origins("last", (1, 3)) == [0, 1, 2, 2, 2, 2, 3]
    assert origins("stack", (3, 4)) == [0, 1, 2, 3, 3, 3, 3]
    assert origins("stack", (0, 4)) == source_layers(DENSE * 4, DENSE * 7, "stack")

    def alive(insert: str) -> list[int]:
        return survivors(DENSE * 4, DENSE * 8, "stack", insert, copied=True, block=(1, 3))

    assert (alive("bottom"), alive("top"), alive("middle")) == (
        [0, 5, 6, 7], [0, 1, 2, 7], [0, 1, 2, 7],
    )  # fmt: skip
    # of two kinds: a kind without new layers needs none in the block
    kinds = DENSE * 2 + MOE * 2, DENSE * 2 + MOE * 4
    assert source_layers(*kinds, "stack", block=(2, 3)) == [0, 1, 2, 2, 2, 3]
    with pytest.raises(ValueError, match="source layer"):
        source_layers(*kinds, "stack", block=(0, 1))


def test_layers_of_two_kinds_keep_to_their_places() -> None:
    source, target = DENSE * 2 + MOE * 2, DENSE * 3 + MOE * 5
    assert source_layers(source, target, "stack") == [0, 1, 0, 2, 3, 2, 3, 2]
    assert source_layers(source, target, "inter") == [0, 0, 1, 2, 2, 2, 3, 3]
    assert source_layers(source, target, "last") == [0, 1, 1, 2, 3, 3, 3, 3]
    assert survivors(source, target, "stack", "bottom", copied=False) == [1, 2, 6, 7]
    assert survivors(source, target, "stack", "top", copied=False) == [0, 1, 3, 4]
    assert survivors(source, target, "stack", "bottom", copied=True) == [0, 1, 5, 6]
    assert survivors(source, target, "stack", "top", copied=True) == [0, 1, 3, 4]
    # a kind that the source lacks takes all layers in turn, and none of them survives there
    assert source_layers(DENSE * 2, DENSE * 2 + MOE * 3, "stack") == [0, 1, 0, 1, 0]
    assert survivors(DENSE * 2, DENSE * 2 + MOE * 3, "stack", "bottom", copied=True) == [0, 1]


def test_a_dense_layer_copied_to_one_with_experts_gives_it_attention_and_norms() -> None:
    config = from_dict({"model": {"family": "deepseek_v3", "num_layers": 3, "mtp_layers": 1}})
    target = model_shape(config)
    rules = depth_map(replace(target, num_layers=1), target, "copying", optimizer_state="copy")
    for name, rule in rules.items():
        if ".layers.2." not in name or name.startswith("mtp"):
            continue
        if ".mlp." in name:
            assert (rule.weights, rule.state, rule.source) == ("init", "zero", None), name
        else:
            assert rule.weights == rule.state == "copy", name
            assert rule.source == name.replace(".layers.2.", ".layers.0.")
    # the prediction module's layer has the kind of the last one, which was dense before
    new = {n for n, rule in rules.items() if n.startswith("mtp") and rule.weights == "init"}
    assert new == {n for n in rules if n.startswith("mtp") and ".mlp." in n}
    rules = depth_map(replace(target, num_layers=0), target, "random")
    assert all(rule.weights == "init" for n, rule in rules.items() if n.startswith("mtp"))


def test_zero_variants_zero_what_their_names_say_and_only_in_new_layers() -> None:
    table = tensor_table(SHAPE)
    rules = depth_map(ONE, SHAPE, "copying_zeroL")
    zeroed = {name for name, rule in rules.items() if rule.weights == "zero"}
    ends = ("linear_proj.weight", "linear_proj.bias", "linear_fc2.weight", "linear_fc2.bias")
    assert zeroed == {n for n in table if n.endswith(ends) and ".layers.5." not in n}
    rules = depth_map(ONE, SHAPE, "copying_zeroN", insert="top")
    zeroed = {name for name, rule in rules.items() if rule.weights == "zero"}
    assert zeroed == {n for n in table if ".layers." in n and "layernorm" in n and ".0." not in n}
    assert all(rule.weights == "copy" for n, rule in rules.items() if ".layers." not in n)


@pytest.mark.parametrize("init", ["random", "copying"])
@pytest.mark.parametrize("insert", ["bottom", "middle", "top"])
def test_new_tensors_are_those_of_layers_that_no_survivor_is(init: str, insert: str) -> None:
    section = {"at": 1, "to_layers": 6, "init": init, "insert": insert}
    config = from_dict({"model": {"family": "gpt2", "num_layers": 3}, "expansion": [section]})
    new = new_tensors(config.expansion[0], model_shape(config), SHAPE)
    copied = init == "copying"
    kept = survivors(DENSE * 3, DENSE * 6, "stack", insert, copied)
    parts = [f"decoder.layers.{layer}." for layer in range(6) if layer not in kept]
    assert len(parts) == 3
    assert new == [name for name in tensor_table(SHAPE) if name.startswith(tuple(parts))]


def test_optimizer_state_policies() -> None:
    new = "decoder.layers.0.mlp.linear_fc1.weight"
    old = "decoder.layers.5.mlp.linear_fc1.weight"
    head = "embedding.word_embeddings.weight"
    for policy, states in {
        "inherit": ("zero", "copy", "copy"),
        "copy": ("copy", "copy", "copy"),
        "reset": ("zero", "zero", "zero"),
    }.items():
        rules = depth_map(ONE, SHAPE, "copying", optimizer_state=policy)
        assert (rules[new].state, rules[old].state, rules[head].state) == states
