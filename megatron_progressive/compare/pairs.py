"""Runs that grow and their controls, as pairs of one seed, and what decides between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from megatron_progressive.compare.arms import EQUAL_FLOPS, FIXED, Comparison
from megatron_progressive.compare.decision import Against, against
from megatron_progressive.compare.gaps import MIXED_PERCENT, gap_percent, has_loss
from megatron_progressive.data import differ, wanted_samples
from megatron_progressive.runs.reading import Run

_DIVERGED = "diverged"


def recipe_of(run: Run) -> str:
    """What runs have in common that are seeds of one another."""
    return repr({k: v for k, v in asdict(run.config).items() if k != "run"})


def seeds_of(comparison: Comparison, finished: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons in ``finished`` of the same recipe whose runs are on the same data, one for
    each seed."""
    data = comparison.progressive.trained_on
    same = [c for c in finished if not differ(c.progressive.trained_on, data)]
    return list({c.progressive.config.run.seed: c for c in same}.values())


def paired(comparisons: Sequence[Comparison]) -> tuple[Against, list[Against]]:
    """What the finished runs of one recipe, of one seed or several, say against fixed-size and
    against each control of equal FLOPs.

    A pair has one seed, and so one order of data, and is validated on the same samples.
    """

    def fixed(comparison: Comparison) -> list[Run]:
        return [comparison.fixed] if comparison.fixed else []

    return _paired("fixed-size", FIXED, fixed, comparisons, MIXED_PERCENT), [
        _paired(control.name, control.arm, control.runs, comparisons) for control in EQUAL_FLOPS
    ]


def _paired(
    name: str, arm: str, controls_of: Callable[[Comparison], list[Run]],
    comparisons: Sequence[Comparison], bound: float = 0.0,
) -> Against:  # fmt: skip
    """The pairs with one control. Where several runs stand for the control (a source at several
    depths), a pair is with the best of them; where some of these are missing, it is not known
    whether that is the best."""
    gaps: list[tuple[int, float]] = []
    left_out: list[str] = []
    lacking: list[str] = []
    diverged = False
    for comparison in comparisons:
        run, controls = comparison.progressive, controls_of(comparison)
        seed = run.config.run.seed
        if not has_loss(run):
            diverged = True
            left_out.append(f"seed {seed}: it diverged")
            continue
        unfit = [(control, _unfit(control, run)) for control in controls]
        losses = [control.final_loss or 0.0 for control, why in unfit if not why]
        if not losses:  # of none at all nothing is said: it is named as missing
            left_out += [f"seed {seed}: {control.name} {why}" for control, why in unfit]
            continue
        gaps.append((seed, gap_percent(run.final_loss or 0.0, min(losses))))
        lacking += [f"seed {seed}: no {m.words}" for m in comparison.missing if m.arm == arm]
        # a depth that diverged is none that could be better
        others = [(control, why) for control, why in unfit if why not in ("", _DIVERGED)]
        lacking += [f"seed {seed}: {control.name} {why}" for control, why in others]
    return against(name, gaps, bound, left_out, diverged, lacking)


def _unfit(control: Run, run: Run) -> str:
    """Why a finished control makes no pair with a run; empty where it makes one."""
    seed = control.config.run.seed
    if not has_loss(control):
        return _DIVERGED
    if seed != run.config.run.seed:
        return f"has seed {seed}"
    if wanted_samples(control.config) != wanted_samples(run.config):
        return "is validated on other samples"
    return ""
