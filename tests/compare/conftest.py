"""Runs that tests of the verdict and of the report share."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_progressive.compare.judged import Report
from megatron_progressive.compare.report import (
    make_report,
)
from tests.runs.synthetic import four_arms


@pytest.fixture(scope="module")
def losing(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path, Report]:
    """All arms, of which the short control ends below the progressive run."""
    folder = tmp_path_factory.mktemp("losing")
    arms = four_arms(folder / "runs", {"progressive": 2.55, "fixed": 2.5, "short": 2.525})
    out = folder / "out"
    return arms, out, make_report(list(arms.values()), out)
