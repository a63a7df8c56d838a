"""Which keys decide a run's numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive.config import ConfigError, RunConfig, from_dict, to_yaml
from megatron_progressive.grid.fingerprint import fingerprint
from megatron_progressive.runs.decisive import decisive
from megatron_progressive.runs.folder import check_folder


def config_of(family: str, micro_batch: int, **model: Any) -> RunConfig:
    return from_dict(
        {"model": {"family": family, **model}, "train": {"micro_batch": micro_batch}},
    )


@pytest.mark.parametrize(
    ("family", "model", "decides"),
    [
        ("mixtral", {}, True),  # the preset's auxiliary loss
        ("mixtral", {"num_layers": 0}, True),  # it grows experts
        ("mixtral", {"moe": {"aux_loss_coeff": 0}}, False),
        ("deepseek_v3", {}, False),  # balanced by the expert bias
        ("deepseek_v3", {"moe": {"aux_loss_coeff": 0.001}}, True),
        ("gpt2", {}, False),
    ],
)
def test_micro_batches_decide_under_a_load_balancing_loss(
    tmp_path: Path, family: str, model: dict[str, Any], decides: bool
) -> None:
    two, four = (config_of(family, size, **model) for size in (2, 4))
    assert (decisive(two) != decisive(four)) is decides
    assert (fingerprint(two) != fingerprint(four)) is decides
    two, four = (replace(one, run=replace(one.run, dir=str(tmp_path))) for one in (two, four))
    two.folder.mkdir(parents=True)
    (two.folder / "config.yaml").write_text(to_yaml(two))
    if decides:
        with pytest.raises(ConfigError, match=r"train\.micro_batch=2, got 4; accepted: the same"):
            check_folder(four)
    else:
        assert check_folder(four) is None
