"""The scaling laws of a study: one fit for each family over its sizes, and what families save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_progressive.config import ConfigError
from megatron_progressive.grid.cells import FIXED, NEVER, SCRATCH, SHORT
from megatron_progressive.grid.results import Result, of_families, once, sizes_of
from megatron_progressive.laws.efficiency import (
    Efficiency,
    Multiplier,
    efficiency_at_compute,
    interpolated_factor,
    pareto,
)
from megatron_progressive.laws.fits import Fit, fit_compute, fit_size_tokens
from megatron_progressive.laws.rollout import Rollout, rollout
from megatron_progressive.runtime.progress import Say


@dataclass(frozen=True)
class Law:
    """The law of a family over FLOPs, or why there is none."""

    family: str
    cells: list[str]
    """The names of the finished cells to which the law is fitted."""
    fit: Fit | None
    refused: str = ""


@dataclass(frozen=True)
class Prediction:
    """What a family's law over FLOPs, fitted to all sizes but the largest, predicts of that one; or
    why there is none."""

    family: str
    size: str
    """The largest size that has finished cells; empty where none has."""
    rollout: Rollout | None
    refused: str = ""


@dataclass(frozen=True)
class Saving:
    """The compute of a family against that of a reference at equal loss, at one size."""

    family: str
    reference: str
    size: str
    params: int
    efficiency: Efficiency | None
    """The efficiency at the loss that the reference has with the FLOPs of its run of this size; by
    the laws of both, and None where one of them has none."""
    between: Multiplier
    """The same between measured cells, without a law."""


def usable(results: Sequence[Result]) -> list[Result]:
    """The results whose final loss is a number."""
    return [r for r in results if r.loss is not None and np.isfinite(r.loss) and r.flops]


def compute_laws(results: Sequence[Result], say: Say) -> list[Law]:
    """The law ``L = E + A / C^alpha`` of every family, over its finished sizes and seeds."""
    laws = []
    for family, members in of_families(results).items():
        say(f"law of {family} over FLOPs")
        done = once(usable(members))
        names = [result.cell.name for result in done]
        try:
            fit = fit_compute([r.flops or 0 for r in done], [r.loss or 0 for r in done])
        except ConfigError as error:
            laws.append(Law(family, names, None, str(error)))
        else:
            laws.append(Law(family, names, fit))
    return laws


def size_token_laws(results: Sequence[Result], say: Say) -> list[Law]:
    """The laws ``L = E + A / N^alpha + B / D^beta`` over parameters N and tokens D: one for all
    runs from scratch of one setting together with their full depths (fixed-size and short controls
    are one recipe at several D), one for each source that never grows, with its own N, and one for
    each family that grows, whose D counts all of its tokens."""
    scratch = [r for r in results if r.cell.arm in (FIXED, SHORT)]
    settings = list(dict.fromkeys(r.cell.setting for r in scratch))
    groups: dict[str, list[Result]] = {}
    for setting in settings or [()]:
        words = "".join(f", {value}" for _, value in setting) if len(settings) > 1 else ""
        name = f"from scratch (fixed-size and short controls{words})"
        groups[name] = [r for r in scratch if r.cell.setting == setting]
    groups |= {
        family: members
        for family, members in of_families(results).items()
        if members[0].cell.arm not in (FIXED, SHORT)
    }  # a source of no layers is no small one of the sizes: it would bend their law
    laws = []
    for family, members in groups.items():
        say(f"law of {family} over sizes and data")
        done = once(usable(members))
        names = [result.cell.name for result in done]
        tokens = [r.run.last_step * r.run.step_tokens for r in done if r.run is not None]
        try:
            fit = fit_size_tokens([r.params for r in done], tokens, [r.loss or 0 for r in done])
        except ConfigError as error:
            laws.append(Law(family, names, None, str(error)))
        else:
            laws.append(Law(family, names, fit))
    return laws


def predictions(results: Sequence[Result], say: Say) -> list[Prediction]:
    """The largest size of every family, predicted from its smaller ones (:mod:`.laws.rollout`)."""
    found = []
    for family, members in of_families(results).items():
        done = once(usable(members))
        sizes = sizes_of(done)
        if len(sizes) < 2:
            why = f"cells: got {len(sizes)} size{'s' * (len(sizes) != 1)}; accepted: at least 2"
            found.append(Prediction(family, next(iter(sizes), ""), None, why))
            continue
        say(f"largest size of {family} from its smaller ones")
        largest = list(sizes)[-1]
        try:
            test = rollout(
                [r.flops or 0 for r in done], [r.loss or 0 for r in done],
                [r.size_params for r in done],
            )  # fmt: skip
        except ConfigError as error:
            found.append(Prediction(family, largest, None, str(error)))
        else:
            found.append(Prediction(family, largest, test))
    return found


def savings(results: Sequence[Result], laws: Sequence[Law]) -> list[Saving]:
    """The compute-efficiency factors of every family that grows, against fixed-size training of its
    own setting and against its own controls of equal FLOPs, at each size that the reference has
    finished: by the laws of both, and between their cells without a law. Left out where neither
    says anything."""
    fits = {law.family: law.fit for law in laws}
    by_family = of_families(results)
    found = []
    for family, members in by_family.items():
        if members[0].cell.arm in SCRATCH:
            continue
        mine = once(usable(members))
        for reference in references(members, results):
            fit, other = fits[family], fits[reference]
            done = once(usable(by_family[reference]))
            for size, params in sizes_of(done).items():
                compute = float(np.mean([r.flops or 0 for r in done if r.cell.size == size]))
                efficiency = None
                if fit is not None and other is not None:
                    efficiency = efficiency_at_compute(fit, other, compute)
                between = interpolated_factor(*_points(mine), *_points(done), compute)
                known = (between.value, between.at_least, between.at_most)
                if efficiency is not None or any(one is not None for one in known):
                    found.append(Saving(family, reference, size, params, efficiency, between))
    return found


def _points(done: Sequence[Result]) -> tuple[list[float], list[float]]:
    """The FLOPs and the final losses of finished cells."""
    return [r.flops or 0.0 for r in done], [r.loss or 0.0 for r in done]


def references(members: Sequence[Result], results: Sequence[Result]) -> list[str]:
    """The families with which a family that grows is compared: fixed-size, its short control, and
    its source never grown at each of its depths."""
    setting, names = members[0].cell.setting, {r.cell.name for r in members}
    fixed = [r.family for r in results if r.cell.arm == FIXED and r.cell.setting == setting]
    mine = [r for r in results if r.cell.control_of in names]
    equal = [r.family for arm in (SHORT, NEVER) for r in mine if r.cell.arm == arm]
    return list(dict.fromkeys([*fixed[:1], *equal]))


def frontier(results: Sequence[Result]) -> list[Result]:
    """The finished cells that no other one beats in both FLOPs and loss, by FLOPs."""
    done = usable(results)
    return [done[i] for i in pareto([r.flops or 0 for r in done], [r.loss or 0 for r in done])]
