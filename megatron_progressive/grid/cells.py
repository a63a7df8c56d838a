"""The cells of a grid: which runs an arm stands for, at one size and seed.

A *cell* is one run. Its name says what it is, its fingerprint what decides its result: cells of
two grids that are the same run share a folder's name, and a finished one is never run again.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError, RunConfig, check_value, from_dict
from megatron_progressive.config.loading import Override
from megatron_progressive.config.places import check_name, check_run_name
from megatron_progressive.config.values import converted, shown
from megatron_progressive.cost.flops import steps_within, total_flops
from megatron_progressive.data import DATA_FILE, DataIdentity, differ, read_identity
from megatron_progressive.grid.data import StudyData
from megatron_progressive.grid.fingerprint import fingerprint
from megatron_progressive.grid.knobs import (
    AFTER,
    KNOBS,
    Choice,
    Spread,
    choices,
    stage_choices,
    stage_ends,
)
from megatron_progressive.models import model_shape, parameter_count
from megatron_progressive.plan import controls
from megatron_progressive.runs.decisive import decisive

FIXED, SHORT, NEVER = "fixed", "short_control", "never_grown"
ALONE = "alone"
"""The arm of a crossing study's two depths, which no list of arms names."""
ZERO_LAYER, ONE_LAYER, FUNCTION_PRESERVING = "zero_layer", "one_layer", "function_preserving"
G_STACK, GRADUAL_STACK, MULTI_STAGE = "g_stack", "gradual_stack", "multi_stage"
ARMS = (FIXED, ZERO_LAYER, ONE_LAYER, SHORT, NEVER, G_STACK, GRADUAL_STACK, FUNCTION_PRESERVING,
        MULTI_STAGE)  # fmt: skip
SCRATCH = (FIXED, SHORT, NEVER, ALONE)
"""Arms that do not grow."""
DEEPER_SOURCE = re.compile(r"([2-9]|[1-9]\d+)_layers")
"""The names of arms with deeper sources: ``2_layers``, ``4_layers``, ..."""
PILOT = "pilot"
"""What stands for a τ that follows from the mixing time which the pilot measures."""

G_STACK_FACTOR, G_STACK_AT = 4, 0.1
"""The growth of G_stack: to four times the layers, early (Du et al. 2024, arXiv 2405.15319)."""
GRADUAL_STAGES = 3
"""The number of depths of gradual stacking: L/4, L/2 and L, for equal numbers of steps unless the
grid has other lengths (:data:`.knobs.STAGES`). Each growth copies the layers that are there (Gong
et al. 2019, "Efficient training of BERT by progressively stacking")."""
MULTI_STAGE_LAYERS = 2
"""The middle depth of multi_stage, which has 0, 2 and L layers; it begins at τ / 2 (arXiv
2511.04981)."""
_AFTER = "expansion.parallel."
"""The prefix of a size's keys that give the layout of the full depth."""
TAU, INIT, SCHEDULE = "tau", "init", "schedule"
DEPTH, BUDGET, AROUND = "depth", "budget", "around"
"""The axes of a crossing study: of the depths alone, and of what grows around their crossing."""
EXPANSION_AXES = (TAU, INIT, AROUND, *KNOBS)
"""The axes of which a cell that runs from scratch has no value."""

TauOf = Callable[[RunConfig], tuple[int, str]]
"""Gives the pilot's τ of a configuration, in steps, and why it is not known; then the τ is
assumed."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    name: str
    """``SIZE-ARM[-tauT-INIT][-KNOB…][-xFACTOR][-SCHEDULE]-sSEED`` (:mod:`.knobs`), and of a depth
    alone ``SIZE-alone-LAYERS-BUDGET[-SCHEDULE]-sSEED``."""
    size: str
    arm: str
    seed: int
    config: RunConfig
    """``run.dir`` is the study's folder of cells, ``run.name`` the cell's folder in it."""
    control_of: str | None = None
    """The name of the cell whose FLOPs a control of equal FLOPs has."""
    axes: Mapping[str, str] = field(default_factory=dict)
    """Where the cell lies among those of its size, arm and seed: a value for each axis that the
    grid can span (:data:`EXPANSION_AXES`, the schedule, and what :func:`.kinds.kind_keys` says of
    the sizes). Two cells that differ in any value are never two seeds of one run. A control of
    equal FLOPs has the values of the cell that it controls."""
    unknown: str = ""
    """Why τ, or the number of steps, is not known. Such a cell is not run; its configuration has an
    assumed one."""
    trained_on: DataIdentity | None = None
    """What the study is trained on; None where that is not settled yet."""

    @property
    def fingerprint(self) -> str:
        return "" if self.unknown else fingerprint(self.config, self.trained_on)

    @property
    def tau(self) -> str:
        """The τ as the grid has it, where the arm spans several; a control has that of its cell."""
        return self.axes.get(TAU, "")

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """What a run that grows has in common with its fixed-size run, beside size and seed."""
        return tuple((key, value) for key, value in self.axes.items() if key not in EXPANSION_AXES)

    @property
    def run_name(self) -> str:
        """The name of the cell's run, which other cells with its fingerprint share."""
        return self.config.run.name

    @property
    def folder(self) -> Path:
        return self.config.folder

    @property
    def flops(self) -> int:
        return total_flops(self.config)


def params_of(cell: Cell) -> int:
    """The number of parameters of a cell's last model."""
    expansion = cell.config.expansion
    return parameter_count(model_shape(cell.config, expansion[-1].to_layers if expansion else None))


@dataclass(frozen=True)
class Span:
    """What the runs that grow cost in all, where a grid spans them around a crossing."""

    factor: str
    """The multiple of the crossing, as names have it."""
    flops: float
    unknown: str = ""
    """Why the crossing is not known; then the FLOPs are assumed."""


class SizeCells:
    """The cells of one size, seed and schedule."""

    _span: Span | None = None

    def __init__(
        self, run: dict[str, Any], size: Any, seed: int, folder: Path, schedule: str | None = None,
        axes: Spread | None = None, overrides: Sequence[str] = (),
        data: StudyData | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            run: the grid's ``run``: the configuration that all cells share.
            size: an entry of its ``sizes``.
            folder: of the study's run folders.
            schedule: instead of the configured ``schedule.name``.
            axes: values of the knobs (:mod:`.knobs`) that expansions span.
            overrides: ``key=value`` words, which come before ``run`` and ``size``.
            data: what the study is trained on (default: not settled).

        Raises:
            ConfigError: no such size, or a configuration that does not hold.
        """
        if not isinstance(size, dict) or not {"name", "to_layers"} <= size.keys():
            raise ConfigError(
                f"sizes: got {shown(size)}; accepted: mappings with name and to_layers"
            )
        if "expansion" in run:
            raise ConfigError("run.expansion: got one; accepted: none (the arms have their own)")
        self.name, self.seed = converted("sizes: name", size["name"], str), seed
        check_name("sizes: name", self.name)
        self.layers = converted("sizes: to_layers", size["to_layers"], int)
        check_value("sizes: to_layers", self.layers, like="expansion.to_layers")
        changes = {key: value for key, value in size.items() if key not in ("name", "to_layers")}
        self._after = {
            key.removeprefix(_AFTER): changes.pop(key)
            for key in [*changes]
            if key.startswith(_AFTER)
        }
        self._knobs, self._data = axes or {}, data
        words: list[Override] = [*changes.items(), *overrides, ("run.seed", seed)]
        config = from_dict(run, words)
        self.config = replace(config, run=replace(config.run, dir=str(folder)))
        if self.config.run.extend:
            raise ConfigError("run.extend: got true in a grid; accepted: false (of a run alone)")
        # the schedule that is configured anyway leaves no mark: names do not depend on the list
        self._mark = ""
        if schedule is not None and schedule != self.config.schedule.name:
            self._mark = f"-{schedule}"
            named = replace(self.config.schedule, name=schedule)
            self.config = replace(self.config, schedule=named)
        self._setting = {SCHEDULE: self.config.schedule.name}

    def distinguish(self, kinds: Sequence[str]) -> None:
        """Make axes of the keys that make another kind of run (:func:`.kinds.kind_keys`)."""
        decides = decisive(self.config)
        self._setting |= {key: str(decides.get(key, "")) for key in kinds}

    def around(self, span: Span) -> SizeCells:
        """The same, with runs that grow for as many steps as ``span`` pays for."""
        other = copy.copy(self)
        other._span, other._mark = span, f"-x{span.factor}{self._mark}"
        other._setting = {**self._setting, AROUND: span.factor}
        return other

    def alone(self, depth: int, budget: str, flops: float) -> Cell:
        """The cell of ``depth`` layers from scratch, with a complete schedule of as many steps as
        ``flops`` pay for (at least one); ``budget`` is how its name has them."""
        config = self._config_of(depth, [])
        steps = max(1, steps_within(config, flops))
        config = replace(config, train=replace(config.train, steps=steps, stop_after=None))
        axes = {DEPTH: str(depth), BUDGET: budget}
        return self._named(f"{ALONE}-{depth}-{budget}", ALONE, config, axes)

    @property
    def schedule(self) -> str:
        return self._setting[SCHEDULE]

    def cells(
        self, arms: list[str], taus: list[Any], inits: list[str], tau_of: TauOf
    ) -> Iterator[Cell]:
        """The cells of ``arms``; controls come last."""
        progressive: list[Cell] = []
        for arm in arms:
            if arm == FIXED:
                yield self._cell(FIXED, self.layers, [])
            elif arm == ZERO_LAYER:
                progressive += self._grown(arm, 0, taus, ["random"], tau_of)
            elif arm == ONE_LAYER:
                progressive += self._grown(arm, 1, taus, inits, tau_of)
            elif arm == FUNCTION_PRESERVING:
                progressive += self._grown(arm, 1, taus, ["copying_zeroL"], tau_of)
            elif arm == G_STACK:
                progressive += self._g_stack()
            elif arm == GRADUAL_STACK:
                progressive += self._gradual_stack()
            elif arm == MULTI_STAGE:
                progressive += self._grown(arm, MULTI_STAGE_LAYERS, taus, inits, tau_of)
            elif match := DEEPER_SOURCE.fullmatch(arm):
                progressive += self._grown(arm, int(match[1]), taus, inits, tau_of)
        yield from progressive
        for cell in progressive if SHORT in arms else ():
            yield self._control(cell, SHORT, controls.short_control(cell.config))
        for cell in progressive if NEVER in arms else ():
            for control in controls.never_grown(cell.config):
                yield self._control(cell, NEVER, control, f"_{control.model.num_layers}")

    def _control(self, cell: Cell, arm: str, config: RunConfig, ending: str = "") -> Cell:
        what = cell.name.removeprefix(f"{self.name}-").removesuffix(f"{self._mark}-s{self.seed}")
        found = self._named(f"{arm}_of_{what}{ending}", arm, config, cell.axes, cell.unknown)
        return replace(found, control_of=cell.name)

    def grown(self, arm: str, at: float, init: str) -> RunConfig:
        """The configuration of a zero- or one-layer run that expands at ``at``."""
        source, init = (0, "random") if arm == ZERO_LAYER else (1, init)
        return self._config_of(source, [{"at": at, "to_layers": self.layers, "init": init}])

    def _config_of(
        self, source: int, expansion: list[dict[str, Any]], choice: Choice | None = None
    ) -> RunConfig:
        values = {**asdict(self.config), "expansion": expansion}
        values["model"]["num_layers"] = source
        if expansion:
            expansion[-1]["parallel"] = self._after
            values["schedule"] |= {} if choice is None else choice.schedule
            if self._span is not None:
                config = from_dict(values, resolved=True)
                values["train"]["steps"] = max(1, steps_within(config, self._span.flops))
        else:
            values["schedule"] |= dict.fromkeys(controls.AFTER_EXPANSIONS)
            if source == self.layers:
                values["parallel"].update(self._after)
        return from_dict(values, resolved=True)

    def _named(
        self, what: str, arm: str, config: RunConfig, axes: Mapping[str, str] | None = None,
        unknown: str = "",
    ) -> Cell:  # fmt: skip
        name = f"{self.name}-{what}{self._mark}-s{self.seed}"
        unknown = unknown or (self._span.unknown if self._span is not None else "")
        trained_on = self.trained_on(config)
        folder = name if unknown else self.choose_name(name, config, [""])
        check_run_name(f"cell {name}", folder)
        placed = replace(config, run=replace(config.run, name=folder))
        axes = {**self._setting, **(axes or {})}
        return Cell(
            name, self.name, arm, self.seed, placed, axes=axes, unknown=unknown,
            trained_on=trained_on,
        )  # fmt: skip

    def trained_on(self, config: RunConfig) -> DataIdentity | None:
        """What the study trains such a run on; None where that is not settled."""
        return None if self._data is None else self._data.known(config)

    def choose_name(self, name: str, config: RunConfig, endings: Sequence[str]) -> str:
        """The name ``name`` with the run's fingerprint. The content of the run's data, which is not
        known at first, is part of it only where run folders of that name (with one of ``endings``)
        are known to be trained on something else."""
        known = self.trained_on(config)
        named = f"{name}-{fingerprint(config)}"
        found = [
            read_identity(config.folder.parent / f"{named}{ending}" / DATA_FILE)
            for ending in endings
        ]
        if any(differ(one, known) for one in found):
            return f"{name}-{fingerprint(config, known)}"
        return named

    def _cell(
        self, arm: str, source: int, expansion: list[dict[str, Any]], choice: Choice | None = None
    ) -> Cell:
        config = self._config_of(source, expansion, choice)
        if choice is None:
            return self._named(arm, arm, config)
        return self._named("-".join([arm, *choice.name]), arm, config, choice.axes)

    def _grown(
        self, arm: str, source: int, taus: list[Any], inits: list[str], tau_of: TauOf
    ) -> Iterator[Cell]:
        """The cells that expand from ``source`` layers at τ; those of multi_stage have grown to
        that depth before."""
        for tau, init in itertools.product(taus, inits):
            at, unknown = tau_of(self.config) if tau == PILOT else (tau, "")
            text = tau if tau == PILOT else f"{tau:g}"
            for choice in choices(self._knobs, source, init):
                last = {"at": at, "to_layers": self.layers, "init": init, **choice.expansion}
                expansions = [last]
                if arm == MULTI_STAGE:
                    half = at / 2 if at < 1 else max(1, round(at / 2))
                    expansions.insert(0, {"at": half, "to_layers": source, "init": "random"})
                source_layers = 0 if arm == MULTI_STAGE else source
                config = self._config_of(source_layers, expansions, choice)
                what = "-".join([f"{arm}-tau{text}-{init}", *choice.name])
                axes = {TAU: text, INIT: init, **choice.axes}
                yield self._named(what, arm, config, axes, unknown)

    def _g_stack(self) -> Iterator[Cell]:
        source = max(1, self.layers // G_STACK_FACTOR)
        for choice in choices(self._knobs, source, "copying", only=AFTER):
            expansion = {"at": G_STACK_AT, "to_layers": self.layers, "init": "copying",
                         "order": "stack", "optimizer_state": "reset"}  # fmt: skip
            yield self._cell(G_STACK, source, [expansion], choice)

    def _gradual_stack(self) -> Iterator[Cell]:
        depths = [max(1, self.layers // 2**k) for k in reversed(range(GRADUAL_STAGES))]
        depths = sorted(set(depths))
        for choice in stage_choices(self._knobs):
            ends = stage_ends(choice, depths, self.name)
            expansions = [
                {"at": end, "to_layers": depth, "init": "copying", "order": "stack",
                 "optimizer_state": "copy"}
                for end, depth in zip(ends, depths[1:], strict=True)
            ]  # fmt: skip
            yield self._cell(GRADUAL_STACK, depths[0], expansions, choice)
