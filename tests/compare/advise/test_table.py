"""The table of findings that comes with the package, against the pages that it cites."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_progressive.compare.advise.evidence import Evidence, shipped
from megatron_progressive.config import load
from megatron_progressive.cost.flops import step_tokens
from megatron_progressive.grid.grid import load_grid
from megatron_progressive.models import active_parameter_count, model_shape

ROOT = Path(__file__).resolve().parents[3]
ROWS = shipped()
OURS = [row for row in ROWS if row.source.startswith("docs/")]


def differences(row: Evidence) -> list[float]:
    return [value for control in row.controls for value in control.values]


def test_every_row_names_its_source_and_what_it_does_not_say() -> None:
    assert len(ROWS) > 30
    for row in ROWS:
        assert re.match(r"arXiv \d{4}\.\d{5}|marin #\d+|docs/experiments/\S+\.md$", row.source)
        # without numbers there is a word on what the source says instead
        assert row.measured or row.note
        assert len({one.control for one in row.controls}) == 2
        growth = row.regime.growth
        if growth is not None:
            assert len(growth.taus) == len(growth.depths) - 1
            assert growth.taus == sorted(growth.taus)
            assert growth.depths == sorted(growth.depths)


@pytest.mark.parametrize("row", OURS, ids=lambda row: f"{row.name}, {row.regime.growth.depths}")
def test_our_rows_are_what_their_pages_say(row: Evidence) -> None:
    """Each difference is on the page, as a percentage or as two losses."""
    page = (ROOT / row.source).read_text(encoding="utf-8").replace("−", "-")
    losses = sorted({float(text) for text in re.findall(r"\b[23]\.\d{4}\b", page)})
    ratios = [100 * (a / b - 1) for a in losses for b in losses if a != b]
    for value in differences(row):
        assert min(abs(value - ratio) for ratio in ratios) < 0.006
    assert differences(row)


def test_sizes_and_tokens_are_those_of_the_runs(tmp_path: Path) -> None:
    for family in ("llama3", "deepseek_v3"):
        words = [f"study.dir={tmp_path}", "tau=[0.5]", "arms=[fixed]"]
        grid = load_grid(ROOT / "configs" / "grids" / f"{family}_tiny.yaml", words)
        for cell in grid.cells:
            shape = model_shape(cell.config)
            params = active_parameter_count(shape)
            tokens = cell.config.train.steps * step_tokens(shape, cell.config) / params
            mine = [row for row in OURS if row.name.endswith(f"ladder, {cell.size}")]
            mine = [row for row in mine if row.regime.family == family]
            assert len(mine) >= 2
            for row in mine:
                assert row.regime.params == params
                assert row.regime.tokens_per_param == pytest.approx(tokens, rel=0.01)
                assert row.regime.growth is not None
                assert row.regime.growth.depths[-1] == cell.config.model.num_layers
    demo = load(ROOT / "configs" / "demo.yaml")
    (row,) = (row for row in OURS if "demo" in row.name)
    shape = model_shape(demo, demo.expansion[-1].to_layers)
    assert row.regime.params == active_parameter_count(shape)


def test_one_seed_is_open_and_a_stage_that_is_missing_decides_nothing() -> None:
    for row in ROWS:
        if all(len(one.values) < 2 for one in row.controls):
            assert row.outcome == "open"
    (stages,) = (row for row in OURS if "stages" in row.name)
    assert stages.controls[1].lacking == ["two layers never grown are not finished"]
