"""What tests of a study's report share."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_progressive.compare import drawing, mixing
from megatron_progressive.grid.report.judged import GridReport
from megatron_progressive.grid.report.report import make_grid_report
from megatron_progressive.grid.state import Study
from megatron_progressive.laws import fits
from megatron_progressive.laws.rollout import rollout
from tests.grid.report.planted import study_of
from tests.runs.synthetic import write_study


@pytest.fixture(autouse=True, scope="module")
def _few_draws() -> Any:
    """Bootstraps of 60 samples and coarse pictures: neither is what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DPI", 30)
        for function in (fits.fit_compute, fits.fit_size_tokens, rollout, mixing.mixing_time):
            patch.setitem(function.__kwdefaults__, "draws", 60)
        yield


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, GridReport]:
    study = study_of(tmp_path_factory.mktemp("planted"))
    write_study(study.grid)
    return study, make_grid_report(study)
