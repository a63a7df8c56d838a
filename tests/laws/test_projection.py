"""The second solver: planted laws come back, it agrees with the first within intervals, and where
it does not the fit says so."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_progressive.laws import fits
from megatron_progressive.laws.fits import Fit, fit_size_tokens
from megatron_progressive.laws.projection import project

E, A, B, ALPHA, BETA = 1.82, 482.0, 2085.0, 0.348, 0.366
"""Besiroglu et al. 2024 (arXiv 2404.10102), rounded."""
SIZES, LENGTHS = np.geomspace(1e7, 1e9, 5), np.geomspace(2e8, 2e10, 5)


def ladder(seed: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes, tokens and losses of a synthetic ladder."""
    size, tokens = (grid.ravel() for grid in np.meshgrid(SIZES, LENGTHS))
    random = np.random.default_rng(seed)
    loss = E + A / size**ALPHA + B / tokens**BETA
    return size, tokens, loss * np.exp(noise * random.standard_normal(len(loss)))


def disagreements(fit: Fit) -> list[str]:
    return [note for note in fit.notes if "second solver" in note]


def test_a_planted_law_comes_back() -> None:
    size, tokens, loss = ladder(0, 0.0)
    logs = np.log(np.column_stack([size, tokens]))
    found = project(logs - logs.mean(axis=0), loss)
    assert found[2:] == pytest.approx([ALPHA, BETA, E], rel=1e-4)


def test_both_solvers_agree_on_100_ladders() -> None:
    ladders = [fit_size_tokens(*ladder(seed, 0.004), draws=60, seed=seed) for seed in range(100)]
    apart = [fit for fit in ladders if disagreements(fit)]
    assert len(apart) <= 5
    determined = [fit for fit in ladders if len(fit.undetermined) == 0]
    assert len(determined) > 80


def test_another_finding_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """One noisy ladder with a second solver that comes out elsewhere in alpha alone."""

    def elsewhere(logs: np.ndarray, losses: np.ndarray) -> np.ndarray:
        found = project(logs, losses)
        found[2] *= 1.5
        return found

    monkeypatch.setattr(fits, "project", elsewhere)
    fit = fit_size_tokens(*ladder(3, 0.004), draws=60)
    (note,) = disagreements(fit)
    assert "finds alpha 0.5" in note
    assert "outside of the interval 0.3" in note
