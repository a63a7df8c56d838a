"""What a short control is expected to lose."""

from __future__ import annotations

import pytest

from megatron_progressive.cost.headroom import expected_loss, headroom_percent


def test_the_law_is_the_published_one() -> None:
    """Chinchilla itself (70B, 1.4T tokens): Besiroglu et al. 2024, and Hoffmann et al. give 1.93 to
    1.98 for it."""
    assert 1.93 < expected_loss(70e9, 1.4e12) < 1.98


@pytest.mark.parametrize(
    ("params", "tokens_a_parameter", "share", "percent"),
    [(124e6, 2000, 0.37, 2.3), (7e9, 100, 0.2, 3.7), (1e9, 50, 0.25, 6.9)],
)
def test_known_cases(
    params: float, tokens_a_parameter: float, share: float, percent: float
) -> None:
    found = headroom_percent(params, tokens_a_parameter * params, share)
    assert found == pytest.approx(percent, abs=0.06)


def test_all_of_the_flops_leave_none() -> None:
    assert headroom_percent(1e9, 1e10, 1.0) == 0
    with pytest.raises(ValueError, match=r"share: got 1\.5"):
        headroom_percent(1e9, 1e10, 1.5)
