"""The fingerprint of a cell: what it tells apart, and what it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_progressive.config import RunConfig, from_dict
from megatron_progressive.data import DataIdentity
from megatron_progressive.grid.fingerprint import fingerprint

VALUES = {
    "model": {"family": "gpt2"},
    "train": {"steps": 100},
    "expansion": [{"at": 0.5, "to_layers": 4}],
}


def changed(word: str) -> RunConfig:
    return from_dict(VALUES, [word])


@pytest.mark.parametrize(
    "word",
    ["run.seed=7", "model.hidden_size=96", "train.steps=101", "train.global_batch=24",
     "optim.lr=0.5", "schedule.name=cosine", "expansion.0.at=0.25", "expansion.0.init=copying",
     "data.validation_fraction=0.2"],
)  # fmt: skip
def test_what_decides_the_result_makes_another_fingerprint(word: str) -> None:
    assert fingerprint(changed(word)) != fingerprint(from_dict(VALUES))


@pytest.mark.parametrize(
    "word",
    ["run.name=other", "run.dir=elsewhere", "parallel.tensor=2", "expansion.0.parallel.pipeline=2",
     "train.micro_batch=2", "train.log_every=3", "train.save_every=5"],
)  # fmt: skip
def test_names_layouts_and_what_is_written_make_none(word: str) -> None:
    assert fingerprint(changed(word)) == fingerprint(from_dict(VALUES))


def test_the_content_of_the_data_is_part_of_it_once_that_is_known() -> None:
    config = from_dict(VALUES)
    known = DataIdentity("a" * 40, "c", None, None)
    found = [fingerprint(config), fingerprint(config, known)]
    found.append(fingerprint(config, replace(known, fingerprint="b" * 40)))
    assert len(set(found)) == 3
    assert {len(one) for one in found} == {12}
    assert fingerprint(config, replace(known, corpus="moved")) == found[1]
