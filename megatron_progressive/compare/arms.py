"""Which run is which arm of a comparison, as the configurations alone tell."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_progressive.config import CONFIG_FILE, RunConfig
from megatron_progressive.cost.flops import step_flops
from megatron_progressive.data import changed_since, differ
from megatron_progressive.plan import controls
from megatron_progressive.runs.decisive import decisive
from megatron_progressive.runs.reading import Run

PROGRESSIVE, FIXED, SHORT, OTHER = "progressive", "fixed-size", "short control", "other"

_EQUAL_FLOPS = 0.02
"""The relative difference of total FLOPs up to which two runs count as equal in compute."""

_DATA = ("corpus", "tokenizer", "text_field", "validation_fraction", "max_bytes")
"""The keys on which the validation loss depends, so that runs which differ in them cannot be
compared. Where it is recorded what both runs were trained on, that counts instead."""

# Of the keys that decide a run's numbers, those in which a control may differ: its name; its seed,
# which :func:`_notes` names; how often it is validated; and its model, which is the target's.
_OWN = ("run.name", "run.seed", "train.eval_every", "model.")


@dataclass(frozen=True)
class Missing:
    """A control that the report lacks."""

    run: str
    """The name of the progressive run."""
    arm: str
    reason: str
    command: str
    """The command that makes the control, or continues it."""


@dataclass(frozen=True)
class Comparison:
    """One progressive run and its controls, of which only finished ones count."""

    progressive: Run
    fixed: Run | None
    short: Run | None
    notes: list[str] = field(default_factory=list)
    """What is to be said where a control is not the exact counterpart."""
    missing: list[Missing] = field(default_factory=list)


EQUAL_FLOPS: tuple[tuple[str, Callable[[Comparison], Run | None]], ...] = (
    ("the short control", lambda comparison: comparison.short),
)
"""The controls of equal FLOPs, by what reports call them: growing pays where it ends below every
one of them that is there. A further control would be one more line here, and a field of
:class:`Comparison`."""


def differences(config: RunConfig, wanted: RunConfig) -> list[str]:
    """The settings that change the numbers, as ``key value (instead of value)``; layouts do not
    change them."""
    mine, theirs = (
        # a control that stops early has not had its whole schedule, though its steps are the same
        {**decisive(one), "train.stop_after": one.train.stop_after}
        for one in (config, wanted)
    )
    return [
        f"{key} {mine.get(key)} (instead of {theirs.get(key)})"
        for key in {**mine, **theirs}
        if not key.startswith(_OWN) and mine.get(key) != theirs.get(key)
    ]


def _same_data(control: Run, progressive: Run) -> bool:
    if control.trained_on is not None and progressive.trained_on is not None:
        return not differ(control.trained_on, progressive.trained_on)
    return _same_names(control, progressive)


def _same_names(control: Run, progressive: Run) -> bool:
    data, other = control.config.data, progressive.config.data
    return all(getattr(data, key) == getattr(other, key) for key in _DATA)


def _same_model(control: Run, progressive: Run) -> bool:
    return not control.config.expansion and control.target == progressive.target


def is_fixed(control: Run, progressive: Run) -> bool:
    """Whether ``control`` is the fixed-size run of ``progressive``."""
    return _same_data(control, progressive) and _fixed_but_for_data(control, progressive)


def _fixed_but_for_data(control: Run, progressive: Run) -> bool:
    mine, theirs = control.config.train, progressive.config.train
    return (
        _same_model(control, progressive)
        and mine.steps == theirs.steps
        and control.config.last_step == progressive.config.last_step
        and mine.global_batch == theirs.global_batch
    )


def is_short(control: Run, progressive: Run) -> bool:
    """Whether ``control`` is the run with as many FLOPs as ``progressive``: fewer steps, total
    FLOPs within 2 % (or within one step, in very short runs)."""
    return _same_data(control, progressive) and _short_but_for_data(control, progressive)


def _short_but_for_data(control: Run, progressive: Run) -> bool:
    if not _same_model(control, progressive):
        return False
    if control.config.last_step >= progressive.config.last_step:
        return False
    one_step = step_flops(control.target, control.config)
    apart = abs(control.planned_flops - progressive.planned_flops)
    return apart <= max(_EQUAL_FLOPS * progressive.planned_flops, one_step)


def _closest(candidates: list[Run], progressive: Run, wanted: RunConfig) -> Run | None:
    """The closest candidate: a finished one if there is any, of the same seed if there is any, with
    the fewest other differences."""

    def rank(run: Run) -> tuple[bool, bool, int]:
        other_seed = run.config.run.seed != progressive.config.run.seed
        return not run.finished, other_seed, len(differences(run.config, wanted))

    return min(candidates, key=rank, default=None)


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """The comparison of each progressive run among ``runs``, in their order."""
    return [_compare_one(run, runs) for run in runs if run.config.expansion]


def _compare_one(progressive: Run, runs: Sequence[Run]) -> Comparison:
    notes: list[str] = []
    missing: list[Missing] = []
    found: dict[str, Run | None] = {}
    for arm, matches, make in (
        (FIXED, _fixed_but_for_data, controls.fixed_size),
        (SHORT, _short_but_for_data, controls.short_control),
    ):
        wanted, reason = make(progressive.config), "not among the runs"
        alike = [run for run in runs if matches(run, progressive)]
        control = _closest([r for r in alike if _same_data(r, progressive)], progressive, wanted)
        notes += [
            f"{run.name} was trained on other data than {progressive.name}, under the same name: "
            "not compared"
            for run in alike
            if _same_names(run, progressive) and not _same_data(run, progressive)
        ]
        if control is not None and not control.finished:
            reason = f"{control.name} is unfinished"
        finished = control if control is not None and control.finished else None
        found[arm] = finished
        if finished is None:
            missing.append(_missing(progressive, arm, reason, wanted, control))
        else:
            notes += _notes(progressive, finished, arm, wanted)
    return Comparison(progressive, found[FIXED], found[SHORT], notes, missing)


def _missing(
    progressive: Run, arm: str, reason: str, wanted: RunConfig, unfinished: Run | None
) -> Missing:
    if unfinished is not None:
        # training resumes from the newest checkpoint
        command = f"mprog train {unfinished.folder / CONFIG_FILE}"
    else:
        path = str(progressive.folder / CONFIG_FILE)
        command = controls.control_command(path, progressive.config, wanted)
        if changed_since(progressive.config, progressive.trained_on):
            # on what the progressive run was trained on, not on what its corpus is now
            assert progressive.trained_on is not None
            command += " " + shlex.quote(f"data.prepared={progressive.trained_on.prepared}")
    return Missing(progressive.name, arm, reason, command)


def _notes(progressive: Run, control: Run, arm: str, wanted: RunConfig) -> list[str]:
    # A short control within the tolerance need not have exactly the steps we would choose.
    apart = [d for d in differences(control.config, wanted) if not d.startswith("train.steps ")]
    if control.config.run.seed != progressive.config.run.seed:
        apart.append(
            f"run.seed {control.config.run.seed} (instead of {progressive.config.run.seed})"
        )
    if not apart:
        return []
    return [f"{control.name}, the {arm} run of {progressive.name}, has {', '.join(apart)}"]


def arm_of(run: Run, comparisons: Sequence[Comparison]) -> str:
    """The arm of a run; ``other`` where no progressive run has it as a control."""
    if run.config.expansion:
        return PROGRESSIVE
    if any(is_fixed(run, c.progressive) for c in comparisons):
        return FIXED
    if any(is_short(run, c.progressive) for c in comparisons):
        return SHORT
    return OTHER
