"""A scaling study as a grid: one YAML file spans sizes, arms, τ, initialisations, schedules and
seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError, check_value, split_word, with_value
from megatron_progressive.config.places import check_name, expanded
from megatron_progressive.config.values import converted, is_null, shown
from megatron_progressive.config.yaml_text import read_yaml
from megatron_progressive.grid.cell_runs import share_runs
from megatron_progressive.grid.cells import (
    ARMS,
    DEEPER_SOURCE,
    FIXED,
    NEVER,
    ONE_LAYER,
    PILOT,
    SHORT,
    ZERO_LAYER,
    Cell,
    SizeCells,
)
from megatron_progressive.grid.crossing import KEYS as CROSSING_KEYS
from megatron_progressive.grid.crossing import (
    Asked,
    GridCrossing,
    asked_of,
    crossings_of,
    places,
    spanned,
)
from megatron_progressive.grid.data import StudyData
from megatron_progressive.grid.kinds import kind_keys
from megatron_progressive.grid.knobs import KNOBS, spread_of
from megatron_progressive.grid.pilot import KEYS as PILOT_KEYS
from megatron_progressive.grid.pilot import GridPilot, grid_pilot
from megatron_progressive.plan.preflight import check_run, smallest_world

_KEYS = ("study", "run", "sizes", "arms", "tau", "init", "expansion", "schedule", "seeds", "pilot",
         "crossing")  # fmt: skip
_STUDY_KEYS = ("name", "dir", "retries")


@dataclass(frozen=True)
class Grid:
    """A study: its folder and its cells."""

    name: str
    folder: Path
    cells: list[Cell]
    retries: int = 2
    """How often a failed cell is tried again."""
    warnings: list[str] = field(default_factory=list)
    pilot: GridPilot | None = None
    file: Path = Path()
    """The file that it was read from."""
    overrides: tuple[str, ...] = ()
    """The ``key=value`` words that it was read with."""
    arms: tuple[str, ...] = ()
    crossings: tuple[GridCrossing, ...] = ()
    """The depths alone, in a grid that spans what grows around their crossings."""

    def reloaded(self) -> Grid:
        """The same grid, read anew from its file."""
        return load_grid(self.file, self.overrides)

    def chosen(self, words: list[str]) -> list[Cell]:
        """The cells with these names, or with these indices in the order of the grid.

        Raises:
            ConfigError: a word is neither a name nor an index.
        """
        names = [cell.name for cell in self.cells]
        found = []
        for word in words:
            index = names.index(word) if word in names else int(word) if word.isdecimal() else -1
            if not 0 <= index < len(names):
                raise ConfigError(
                    f"--cell: got {word!r}, which {self.file} does not have; accepted: a name, or "
                    f"an index from 0 to {len(names) - 1}, as mprog grid plan prints them"
                )
            found.append(self.cells[index])
        return list({cell.name: cell for cell in found}.values())


def load_grid(path: Path, overrides: Sequence[str] = ()) -> Grid:
    """The cells of a grid file, each of them checked as ``mprog train`` would.

    Keys of the file: ``study`` (``name``, ``dir``, ``retries``), ``run`` (the configuration that
    all cells share, without expansions), ``sizes`` (a list of ``name``, ``to_layers`` and ``key:
    value`` changes; ``expansion.parallel.KEY`` is a key of the layout at full depth), ``arms``,
    ``tau`` (fractions, steps, or ``pilot``), ``init`` (for sources with layers), ``expansion``
    (lists of knobs, see :mod:`.knobs`), ``schedule`` (names, instead of
    ``run.schedule.name``), ``seeds``, ``pilot`` (``size``, ``steps``, ``at``, ``source``; see
    :func:`.pilot.grid_pilot`), and ``crossing`` (``source``, ``budgets``, ``around``; see
    :func:`.crossing.asked_of`), with which the numbers of steps follow from FLOPs.

    Args:
        overrides: ``key=value`` words. Words of the file's keys replace values in it
            (``study.dir=…``, ``seeds=[1,2]``), other words change the configuration of every cell,
            whatever ``run`` and ``sizes`` say (``train.steps=100``).

    Raises:
        ConfigError: there is no such file, a key or an arm is unknown, or a cell cannot run.
    """
    values, words = _with_overrides(read_yaml(path, "GRID"), overrides)
    _check_keys(values, _KEYS, "")
    study = _mapping(values, "study")
    _check_keys(study, _STUDY_KEYS, "study.")
    name = converted("study.name", study.get("name", path.stem), str)
    check_name("study.name", name)
    directory = converted("study.dir", study.get("dir", "studies"), str)
    folder = Path(expanded("study.dir", directory)) / name
    crosses = not is_null(values.get("crossing"))
    usual = [ONE_LAYER, SHORT, NEVER] if crosses else [FIXED, ZERO_LAYER, ONE_LAYER, SHORT, NEVER]
    arms = _listed(values, "arms", usual)
    for arm in arms:
        if not isinstance(arm, str) or (arm not in ARMS and not DEEPER_SOURCE.fullmatch(arm)):
            raise ConfigError(f"arms: got {shown(arm)}; accepted: {', '.join(ARMS)}, N_layers")
    taus = _taus(values)
    wanted = _crossing(values, arms, taus) if crosses else None
    inits, seeds = _texts(values, "init", ["copying"], "", "expansion.init"), _seeds(values)
    schedules: list[str | None] = [None]
    if "schedule" in values:
        schedules = _texts(values, "schedule", [], "", "schedule.name")
    spread = _mapping(values, "expansion")
    _check_keys(spread, KNOBS, "expansion.")
    axes = spread_of(spread)
    settled = StudyData(folder)
    bases = [
        SizeCells(
            _mapping(values, "run"), size, seed, folder / "cells", schedule, axes, words, settled
        )
        for size in _sizes(values)
        for schedule in schedules
        for seed in seeds
    ]
    kinds = kind_keys(bases)
    for base in bases:
        base.distinguish(kinds)
    if not bases:
        raise ConfigError(f"sizes: got none in {path}; accepted: a list of sizes")
    pilot, asked = None, _mapping(values, "pilot")
    if not is_null(values.get("pilot")) or PILOT in taus:
        _check_keys(asked, PILOT_KEYS, "pilot.")
        first = {base.name: base for base in reversed(bases)}  # of each size
        pilot = grid_pilot(asked, list(first.values())[::-1], arms, inits[0], folder)
    cells: dict[str, Cell] = {}
    crossings: list[GridCrossing] = []
    if wanted is not None:
        crossings = crossings_of(wanted, bases, folder / "cells")
        cells = {cell.name: cell for one in crossings for cell in one.cells}
        bases = spanned(wanted, crossings, bases, arms, taus, inits)
    for base in bases:
        tau_of = pilot.tau_of if pilot is not None else lambda config: (1, "")
        for cell in base.cells(arms, taus, inits, tau_of):
            if cells.setdefault(cell.name, cell).config != cell.config:
                raise ConfigError(
                    f"cell {cell.name}: got two of this name (τ {cell.tau}); accepted: τ that "
                    f"differ in their first six digits"
                )
    shared = share_runs(list(cells.values()), folder / "cells")
    return Grid(name, folder, shared, _retries(study), _warnings(cells), pilot, path,
                tuple(overrides), tuple(arms), tuple(places(shared, crossings)))  # fmt: skip


def _warnings(cells: dict[str, Cell]) -> list[str]:
    """The warnings of all cells, each of which is checked."""
    warnings = []
    for cell in cells.values():
        try:
            found = check_run(cell.config, smallest_world(cell.config))
        except ConfigError as error:
            raise ConfigError(f"cell {cell.name}: {error}") from None
        warnings += [f"{cell.name}: {warning}" for warning in found]
    return warnings


def _crossing(values: dict[str, Any], arms: list[str], taus: list[Any]) -> Asked:
    if not is_null(values.get("pilot")):
        raise ConfigError("pilot: got one with crossing; accepted: one of both")
    _check_keys(values["crossing"], CROSSING_KEYS, "crossing.")
    return asked_of(values["crossing"], arms, taus)


def _with_overrides(
    values: dict[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The file's values with the words of its keys, and the words of the cells' configuration."""
    words = []
    for word in overrides:
        key, value = split_word(word)
        if key in ("run.name", "run.dir", "run.seed"):
            raise ConfigError(f"{key}: got {shown(value)}; accepted: study.name, study.dir, seeds")
        # schedule.name=… is the cells', schedule=[…] the grid's
        own = key in _KEYS or key.split(".")[0] in ("study", "expansion", "pilot", "crossing")
        if not own or key == "run":
            words.append(word)
            continue
        try:
            values = with_value(values, key, value)
        except KeyError:
            raise ConfigError(f"{key}: unknown key; accepted: {', '.join(_KEYS)}") from None
    return values, words


def _taus(values: dict[str, Any]) -> list[Any]:
    taus: list[Any] = []
    for tau in _listed(values, "tau", [0.8]):
        try:
            taus.append(PILOT if tau == PILOT else converted("tau", tau, float))
        except ConfigError:
            taus.append(math.nan)
        if taus[-1] != PILOT and not 0 < taus[-1] < math.inf:
            raise ConfigError(f"tau: got {shown(tau)}; accepted: fractions, steps, or {PILOT}")
    return taus


def _sizes(values: dict[str, Any]) -> list[Any]:
    sizes = _listed(values, "sizes", [])
    names = [str(size["name"]) for size in sizes if isinstance(size, dict) and "name" in size]
    for name in names:
        if names.count(name) > 1:
            got = f"{names.count(name)} named {name}"
            raise ConfigError(f"sizes: got {got}; accepted: a name of its own for each")
    return sizes


def _seeds(values: dict[str, Any]) -> list[int]:
    seeds = [converted("seeds", seed, int) for seed in _listed(values, "seeds", [1])]
    for seed in seeds:
        check_value("seeds", seed, like="run.seed")
    return seeds


def _retries(study: dict[str, Any]) -> int:
    retries: int = converted("study.retries", study.get("retries", 2), int)
    if retries < 0:
        raise ConfigError(f"study.retries: got {retries}; accepted: an integer from 0")
    return retries


def _listed(values: dict[str, Any], key: str, default: list[Any], prefix: str = "") -> list[Any]:
    found = values.get(key, default)
    if not isinstance(found, list):
        raise ConfigError(f"{prefix}{key}: got {shown(found)}; accepted: a list")
    return found


def _texts(
    values: dict[str, Any], key: str, default: list[Any], prefix: str, field: str
) -> list[Any]:
    """The list of choices of a field."""
    found = [
        converted(f"{prefix}{key}", item, str) for item in _listed(values, key, default, prefix)
    ]
    for item in found:
        check_value(f"{prefix}{key}", item, like=field)
    return found


def _mapping(values: dict[str, Any], key: str) -> Any:
    """What is given under a key; an empty mapping where nothing is given."""
    return {} if is_null(values.get(key)) else values[key]


def _check_keys(values: Any, known: tuple[str, ...], prefix: str) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.')}: got {shown(values)}; accepted: a mapping")
    for key in values:
        if key not in known:
            raise ConfigError(f"{prefix}{key}: unknown key; accepted: {', '.join(known)}")
