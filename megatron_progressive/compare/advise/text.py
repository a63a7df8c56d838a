"""Advice as plain text of at most 100 columns, and as plain values."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_progressive.compare.advise.advice import UNKNOWN, Advice, Weighed
from megatron_progressive.compare.advise.distance import (
    NEAR,
    OTHER_FAMILY,
    OTHER_KIND,
    OTHER_OPTIMIZER,
    REACH,
    SIZE_FACTOR,
    number_text,
    size_text,
)
from megatron_progressive.compare.advise.proposal import pilot_folder
from megatron_progressive.compare.advise.regime import Regime, growth_text
from megatron_progressive.compare.arms import EQUAL_FLOPS
from megatron_progressive.compare.decision import DOES_NOT_PAY, OPEN, PAYS
from megatron_progressive.compare.verdict_words import decided_evidence
from megatron_progressive.cost.headroom import LAW
from megatron_progressive.runtime.files import finite_values
from megatron_progressive.runtime.text import short_counts

_WIDTH = 100
_LABEL = 16

_ANSWERS = {
    PAYS: "growing is expected to pay: {n} near enough and grown alike, {k} of which decided over "
    "several seeds, below both controls",
    DOES_NOT_PAY: "growing is not expected to pay: {n} near enough and grown alike, {k} of which "
    "decided over several seeds, not below both controls",
    OPEN: "open: {n} near enough and grown alike, which decide nothing or contradict each other",
    UNKNOWN: "nothing known for this regime: no run that grew alike and was compared with a "
    "control of equal FLOPs is near enough",
}
_CONTROLS = {control.name: control.arm.replace("-", " ") for control in EQUAL_FLOPS}


def render(advice: Advice, pilot_file: str, config_words: Sequence[str]) -> str:
    """The advice as text, without a last newline.

    Args:
        pilot_file: the file that the pilot is written to, or is to be.
        config_words: the configuration and the words that replace fields of it, as they were given.
    """
    lines = [f"Advice for {advice.name}"]
    lines += _line("plan", _regime_text(advice.regime))
    growth = advice.regime.growth
    lines += _line("growth", "none yet" if growth is None else growth_text(growth))
    decided = sum(one.evidence.outcome != OPEN for one in advice.basis)
    answer = _ANSWERS[advice.answer].format(n=_many(len(advice.basis)), k=decided)
    lines += _line("answer", answer)
    for control, outcome in advice.controls.items():
        lines += _line(_CONTROLS[control], outcome)
    lines += _line("headroom", _headroom(advice))
    lines += _line("to try", _best(advice))
    lines += ["", f"What the answer rests on (within {NEAR:g} octaves, grown alike)"]
    lines += _listed(advice.basis) or ["  nothing"]
    lines += ["", "Nearest of the rest, which does not count"]
    lines += _listed(advice.others) or ["  nothing"]
    lines += ["", "Limits", *(part for text in _limits(advice) for part in _item(text))]
    if advice.pilot is not None:
        lines += ["", "Pilot: this regime at a small size, over several seeds"]
        lines += ["  (the first command writes the grid below, the last reads what it found)"]
        commands = [
            ["advise", *config_words, "--pilot", pilot_file],
            ["grid", "plan", pilot_file],
            ["grid", "run", pilot_file, "--workers", "2"],
            ["grid", "report", pilot_file],
            ["advise", *config_words, "--studies", *advice.studies, pilot_folder(advice.name)],
        ]
        lines += [f"  {shlex.join(['mprog', *words])}" for words in commands]
        lines += ["", advice.pilot.rstrip()]
    return "\n".join(lines)


def as_values(advice: Advice) -> dict[str, Any]:
    """The advice as plain values; null where a number is not finite."""
    values: dict[str, Any] = finite_values(asdict(advice))
    weighed = [*advice.basis, *advice.others]
    for one, found in zip([*values["basis"], *values["others"]], weighed, strict=True):
        one["evidence"]["outcome"] = found.evidence.outcome
    return values


def _line(label: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, _WIDTH - 2 - _LABEL, break_on_hyphens=False) or [""]
    return [
        f"  {label if i == 0 else '':<{_LABEL}}{part}".rstrip() for i, part in enumerate(wrapped)
    ]


def _item(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False
    )


def _many(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _regime_text(regime: Regime) -> str:
    params = short_counts([round(regime.params)])[0]
    active = "active parameters" if regime.experts else "parameters"
    tokens = regime.tokens_per_param
    said = "an unknown number of tokens" if tokens is None else f"{number_text(tokens)} tokens"
    return (
        f"{regime.family}, {params} {active}, {said} a parameter, "
        f"{regime.optimizer or 'optimizer not told'}, {regime.schedule or 'schedule not told'}"
    )


def _headroom(advice: Advice) -> str:
    if advice.flops_share is None:
        return "none to tell: the plan does not grow"
    if advice.headroom_percent is None:
        return "none: the plan saves nothing against fixed-size"
    return (
        f"with {100 * advice.flops_share:.0f} % of fixed-size's FLOPs the short control is "
        f"expected to end {advice.headroom_percent:.1f} % above it ({LAW}; other data and "
        f"optimizers differ): about as much as growing can win"
    )


def _best(advice: Advice) -> str:
    found = advice.best
    if found is None:
        return (
            f"no growth within {REACH:g} octaves ended below its controls: no factor, no τ to name"
        )
    regime, growth = found.evidence.regime, found.evidence.regime.growth
    assert growth is not None
    factor = "" if growth.factor is None else f"depth x {growth.factor:.2g}: "
    return (
        f"{factor}{growth_text(growth)}, the lowest against its controls within {REACH:g} octaves "
        f"({_differences(found)}; {found.evidence.source}, {found.distance:.1f} octaves away, "
        f"{_regime_text(regime)})"
    )


def _listed(found: list[Weighed]) -> list[str]:
    lines = []
    for one in found:
        evidence, growth = one.evidence, one.evidence.regime.growth
        grown = "of no one growth" if growth is None else growth_text(growth)
        away = "not placed" if one.distance == float("inf") else f"{one.distance:.1f} octaves"
        apart = f"{away} ({', '.join(one.apart)})" if one.apart else away
        other = "" if one.alike else "; grown otherwise"
        text = f"{evidence.name}, {grown}: {_differences(one)} [{evidence.source}; {apart}{other}]"
        lines += _item(text + (f" {evidence.note}." if evidence.note else ""))
    return lines


def _differences(one: Weighed) -> str:
    said = [
        f"to {c.control} {'not run' if c.mean is None else decided_evidence(c)}"
        for c in one.evidence.controls
    ]
    if not one.evidence.measured:
        return "no control of equal FLOPs"
    return f"{'; '.join(said)}: {one.evidence.outcome}"


def _limits(advice: Advice) -> list[str]:
    found = []
    if advice.basis:
        far = max(advice.basis, key=lambda one: abs(_ratio(advice, one)))
        ratio = advice.regime.params / far.evidence.regime.params
        if max(ratio, 1 / ratio) > 10:
            found.append(
                f"The model of a finding that counts is {size_text(ratio)}: that it carries over "
                f"sizes is assumed."
            )
    if any(len(c.values) == 1 for one in advice.basis for c in one.evidence.controls):
        found.append("One seed decides nothing, whatever the difference.")
    found.append(
        "Learning rates that are not tuned for the length of a run flatter growth; data that is "
        "read more than once favours shallow models."
    )
    found.append(
        f"A finding is near within {NEAR:g} octaves of tokens a parameter, to which a factor of "
        f"{SIZE_FACTOR:g} in size adds 1, another family {OTHER_FAMILY:g}, experts in one of both "
        f"{OTHER_KIND:g}, another optimizer {OTHER_OPTIMIZER:g}: a rule, not a law."
    )
    if advice.studies:
        found.append(f"Studies of yours that were read: {', '.join(advice.studies)}.")
    return found


def _ratio(advice: Advice, one: Weighed) -> float:
    return math.log(advice.regime.params / one.evidence.regime.params)
