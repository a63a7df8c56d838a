"""The tool that compares optimizers, on curves whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from tools.tokens_to_loss import first_reached


@pytest.mark.parametrize(
    ("target", "tokens"), [(5.0, 100.0), (4.0, 200.0), (3.5, 250.0), (3.0, 300.0), (2.9, None)]
)
def test_first_reached(target: float, tokens: float | None) -> None:
    curve = np.array([5.0, 4.0, 3.0, 3.4]), np.array([100.0, 200.0, 300.0, 400.0])
    assert first_reached(curve[1], curve[0], target) == tokens
