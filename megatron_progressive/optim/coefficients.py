"""Coefficient sets of the Newton-Schulz iteration, by name. Needs no torch.

One step maps each singular value s to a s + b s^3 + c s^5. The package `emerging-optimizers` has
the same sets (``simple``, ``polar_express`` and ``deepseekv4`` there, cut to four digits); its
module loads Triton and absl, which a CPU machine need not have, so the numbers are here and a
test compares them where the package is installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_progressive.config import OptimSection

Coefficients = tuple[float, float, float]
"""The coefficients (a, b, c) of one step."""

_JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class CoefficientSet:
    """A set of coefficients; steps after the last of ``values`` repeat that one."""

    values: tuple[Coefficients, ...]
    steps: int
    """The number of steps where ``optim.ns_steps`` does not give one."""


def _safe(values: tuple[Coefficients, ...], factor: float) -> tuple[Coefficients, ...]:
    """The polynomials of s / factor, with which rounding that lifts s a little above 1 does no
    harm."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in values)


SETS: dict[str, CoefficientSet] = {
    # K. Jordan, kellerjordan.github.io/posts/muon, December 2024. Singular values end between
    # about 0.7 and 1.2, which is as good for Muon as exactly 1.
    "jordan": CoefficientSet((_JORDAN,), 5),
    # Amsel, Persson, Musco and Gower 2025, arXiv 2505.16932: minimax-optimal steps for singular
    # values from 0.001; five steps as in its training runs. 1.01 is the paper's own safety factor;
    # the last pair is the limit, which needs none.
    "polar_express": CoefficientSet(
        (
            *_safe(
                (
                    (8.28721201814563, -23.595886519098837, 17.300387312530933),
                    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                ),
                1.01,
            ),
            (1.875, -1.25, 0.375),
        ),
        5,
    ),
    # DeepSeek-AI 2026, DeepSeek-V4 technical report: eight steps of Jordan's bring small singular
    # values up, two of (2, -1.5, 0.5), whose derivative at 1 is zero, bring all to 1.
    "deepseek_v4": CoefficientSet((*(_JORDAN,) * 8, *((2.0, -1.5, 0.5),) * 2), 10),
}


def ns_steps(optim: OptimSection) -> int:
    """The number of Newton-Schulz steps of a run: ``optim.ns_steps``, or else that of its set."""
    return optim.ns_steps or SETS[optim.ns_coefficients].steps


def ns_coefficients(name: str = "jordan", steps: int | None = None) -> tuple[Coefficients, ...]:
    """The coefficients of each step.

    Args:
        name: the name of the set.
        steps: the number of steps; None for the set's own.

    Raises:
        KeyError: there is no set of this name.
    """
    chosen = SETS[name]
    count = steps or chosen.steps
    more = max(0, count - len(chosen.values))
    return (*chosen.values[:count], *(chosen.values[-1],) * more)
