"""Which run is which arm of a comparison, as the configurations alone tell."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_progressive.config import CONFIG_FILE, RunConfig
from megatron_progressive.cost.flops import step_flops
from megatron_progressive.data import changed_since, differ
from megatron_progressive.models import model_shape
from megatron_progressive.plan import controls
from megatron_progressive.runs.decisive import decisive
from megatron_progressive.runs.reading import Run

PROGRESSIVE, FIXED, SHORT, OTHER = "progressive", "fixed-size", "short control", "other"
NEVER = "never-grown"

_SHORT_FLOPS = 0.02
"""Relative difference of total FLOPs up to which a short control, which may have been trained for
a round number of steps, counts as equal in compute."""

_DATA = ("corpus", "mix", "tokenizer", "text_field", "validation_fraction", "max_bytes")
"""The keys on which the validation loss depends, so that runs which differ in them cannot be
compared. Where it is recorded what both runs were trained on, that counts instead."""

# Of the keys that decide a run's numbers, those in which a control may differ: its name; its seed,
# which :func:`_notes` names; how often it is validated; and its model, which is one of the run's.
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
    layers: str = ""
    """The depth of a source that never grows, in words: ``4 layers``."""

    @property
    def words(self) -> str:
        """What the control is called: ``short control run``, ``never-grown run of 4 layers``."""
        return f"{self.arm} run" + f" of {self.layers}" * bool(self.layers)


@dataclass(frozen=True)
class Comparison:
    """One progressive run and its controls, of which only finished ones count."""

    progressive: Run
    fixed: Run | None
    short: Run | None
    never: list[Run] = field(default_factory=list)
    """The runs of its source that never grow: of a run in stages, one at each depth before the full
    one."""
    notes: list[str] = field(default_factory=list)
    """What is to be said where a control is not the exact counterpart."""
    missing: list[Missing] = field(default_factory=list)

    @property
    def controls(self) -> list[Run]:
        """All controls that are there."""
        return [run for run in (self.fixed, self.short, *self.never) if run is not None]


@dataclass(frozen=True)
class Control:
    """A control of equal FLOPs."""

    name: str
    """What reports call it."""
    arm: str
    runs: Callable[[Comparison], list[Run]]
    """The finished runs of this control in a comparison; of several, the one with the lowest loss
    counts."""


EQUAL_FLOPS: tuple[Control, ...] = (
    Control("the short control", SHORT, lambda found: [found.short] if found.short else []),
    Control("the source never grown", NEVER, lambda found: found.never),
)
"""The controls of equal FLOPs: growing pays where it ends below every one of them. A further one is
one more line here, and a field of :class:`Comparison`."""


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
    return _apart(control, progressive) <= max(
        _SHORT_FLOPS * progressive.planned_flops, step_flops(control.target, control.config)
    )


def _apart(control: Run, progressive: Run) -> int:
    return abs(control.planned_flops - progressive.planned_flops)


def is_never(control: Run, progressive: Run, depth: int | None = None) -> bool:
    """Whether ``control`` is a source of ``progressive`` that never grows: a depth that this has
    before its full one (or ``depth``), and its total FLOPs to one step of the control's."""
    depths = [depth] if depth is not None else controls.depths_before(progressive.config)
    return _same_data(control, progressive) and any(
        _never_but_for_data(control, progressive, one) for one in depths
    )


def _never_but_for_data(control: Run, progressive: Run, depth: int) -> bool:
    return (
        not control.config.expansion
        and control.target == model_shape(progressive.config, depth)
        and _apart(control, progressive) <= step_flops(control.target, control.config)
    )


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


_Matches = Callable[[Run, Run], bool]


def _wanted(config: RunConfig) -> list[tuple[str, _Matches, RunConfig]]:
    """Each control of a run: its arm, what is recognised as it, and what it is at best."""

    def of_depth(depth: int) -> _Matches:
        return lambda control, progressive: _never_but_for_data(control, progressive, depth)

    never = zip(controls.depths_before(config), controls.never_grown(config), strict=True)
    return [
        (FIXED, _fixed_but_for_data, controls.fixed_size(config)),
        (SHORT, _short_but_for_data, controls.short_control(config)),
        *((NEVER, of_depth(depth), wanted) for depth, wanted in never),
    ]


def _compare_one(progressive: Run, runs: Sequence[Run]) -> Comparison:
    notes: list[str] = []
    missing: list[Missing] = []
    found: dict[str, list[Run]] = {FIXED: [], SHORT: [], NEVER: []}
    for arm, matches, wanted in _wanted(progressive.config):
        reason = "not among the runs"
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
        if control is not None and control.finished:
            found[arm].append(control)
            notes += _notes(progressive, control, arm, wanted)
        else:
            missing.append(_missing(progressive, arm, reason, wanted, control))
    fixed, short = (next(iter(found[arm]), None) for arm in (FIXED, SHORT))
    return Comparison(progressive, fixed, short, found[NEVER], notes, missing)


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
            words = progressive.trained_on.prepared_words()
            command += "".join(f" {shlex.quote(word)}" for word in words)
    layers = depth_words(wanted) if arm == NEVER else ""
    return Missing(progressive.name, arm, reason, command, layers)


def depth_words(config: RunConfig) -> str:
    """``1 layer``, ``4 layers``: of a run that does not grow."""
    layers = model_shape(config).num_layers
    return f"{layers} layer{'s' * (layers != 1)}"


def _notes(progressive: Run, control: Run, arm: str, wanted: RunConfig) -> list[str]:
    # A control within the tolerance need not have exactly the steps we would choose.
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
    if any(is_never(run, c.progressive) for c in comparisons):
        return NEVER
    return OTHER
