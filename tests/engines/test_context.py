"""Context parallelism: sequences that ranks divide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engines import context_on_ranks, on_ranks
from tests.pool import Pool


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("key_groups", "width", "value_width"),
    [(4, 8, 8), (2, 8, 8), (4, 12, 8)],
    ids=["heads", "grouped", "latent"],
)
def test_attention_is_that_of_the_whole_sequence(
    pool: Pool, ranks: int, key_groups: int, width: int, value_width: int
) -> None:
    sizes = (key_groups, width, value_width)
    for differences in pool.run(ranks, context_on_ranks.attention_beside_torch, *sizes):
        assert max(differences) < 3e-6, differences


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_are_megatrons_and_have_equally_much_to_do(pool: Pool, ranks: int) -> None:
    parts = pool.run(ranks, context_on_ranks.part_beside_megatrons)
    assert all(ours == theirs for ours, theirs, _ in parts)
    length = context_on_ranks.LENGTH
    assert {pairs for _, _, pairs in parts} == {length * (length + 1) // 2 // ranks}
    assert sorted(t for ours, _, _ in parts for t in ours[0]) == list(range(length))


@pytest.mark.parametrize("family", ["gpt2", "deepseek_v3"])
def test_validation_losses_are_those_of_one_rank(pool: Pool, family: str) -> None:
    words = ["model.num_layers=2"]
    config = on_ranks.family_config(family, words)
    wanted = pool.run(1, context_on_ranks.trained_and_validated, config)[0]
    for world, layout in ((2, ["parallel.context=2"]), (4, ["parallel.context=2"])):
        config = on_ranks.family_config(family, [*words, *layout])
        for found in pool.run(world, context_on_ranks.trained_and_validated, config):
            assert found == pytest.approx(wanted, rel=2e-6), (world, layout)


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "bf16"), ("muon_nsgd", "fp32")])
def test_checkpoints_onto_and_from_a_divided_sequence(
    pool: Pool, tmp_path: Path, optimizer: str, precision: str
) -> None:
    base = [f"optim.name={optimizer}", f"train.precision={precision}", "model.num_layers=2"]
    divided = on_ranks.family_config("llama3", [*base, "parallel.context=2"])
    other = on_ranks.family_config("llama3", [*base, "parallel.tensor=2"])
    for name, source, target in (("onto", other, divided), ("from", divided, other)):
        saved, loaded = pool.run(2, on_ranks.saved_and_loaded, source, target, tmp_path / name)[0]
        assert set(saved) == set(loaded)
        assert [key for key in saved if not torch.equal(saved[key], loaded[key])] == []


def test_no_two_ranks_have_the_same_replica(pool: Pool) -> None:
    """Of which the first alone is saved."""
    words = ["model.num_layers=1", "parallel.context=2", "parallel.zero_stage=0"]
    for words_of in (["parallel.tensor=2"], []):
        config = on_ranks.family_config("llama3", [*words, *words_of])
        pieces = [one for rank in pool.run(4, context_on_ranks.replicas, config) for one in rank]
        assert len(set(pieces)) == len(pieces)
