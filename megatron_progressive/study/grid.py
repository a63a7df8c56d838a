"""A scaling study as a grid: one YAML file spans sizes, arms, τ, initialisations, schedules and
seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_progressive.config import ConfigError, split_word
from megatron_progressive.study.cell_runs import share_runs
from megatron_progressive.study.cells import (
    ARMS,
    DEEPER_SOURCE,
    EXPANSION_KEYS,
    FIXED,
    ONE_LAYER,
    PILOT,
    SHORT,
    ZERO_LAYER,
    Cell,
    SizeCells,
)
from megatron_progressive.study.grid_data import StudyData
from megatron_progressive.study.grid_pilot import KEYS as PILOT_KEYS
from megatron_progressive.study.grid_pilot import GridPilot, grid_pilot
from megatron_progressive.study.kinds import kind_keys
from megatron_progressive.study.preflight import check_run, smallest_world

_KEYS = ("study", "run", "sizes", "arms", "tau", "init", "expansion", "schedule", "seeds", "pilot")
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
    """That it was read from."""
    overrides: tuple[str, ...] = ()
    """``key=value`` words that it was read with."""

    def reloaded(self) -> Grid:
        """The same grid, read anew."""
        return load_grid(self.file, self.overrides)

    def chosen(self, words: list[str]) -> list[Cell]:
        """The cells of names, or of indices in the grid's order.

        Raises:
            ConfigError: neither.
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
    all cells share, without expansions), ``sizes`` (a list of ``name``, ``to_layers`` and
    ``key: value`` changes; ``expansion.parallel.KEY`` is of the layout at full depth), ``arms``,
    ``tau`` (fractions, steps, or ``pilot``), ``init`` (of sources with layers), ``expansion``
    (lists of ``order``, ``insert``, ``optimizer_state``), ``schedule`` (names, instead of
    ``run.schedule.name``), ``seeds``, and ``pilot`` (``size``, ``steps``, ``at``, ``source``; see
    :func:`.grid_pilot.grid_pilot`).

    Args:
        overrides: ``key=value`` words. Those of the file's keys replace values in it
            (``study.dir=…``, ``seeds=[1,2]``), others the configuration of every cell, whatever
            ``run`` and ``sizes`` say (``train.steps=100``).

    Raises:
        ConfigError: no such file, an unknown key or arm, or a cell that cannot run.
    """
    values, words = _with_overrides(_read(path), overrides)
    _check_keys(values, _KEYS, "")
    study = values.get("study") or {}
    _check_keys(study, _STUDY_KEYS, "study.")
    name = str(study.get("name", path.stem))
    folder = Path(str(study.get("dir", "studies"))) / name
    arms = _listed(values, "arms", [FIXED, ZERO_LAYER, ONE_LAYER, SHORT])
    for arm in arms:
        if arm not in ARMS and not DEEPER_SOURCE.fullmatch(str(arm)):
            raise ConfigError(f"arms: got {arm!r}; accepted: {', '.join(ARMS)}, N_layers")
    taus = _taus(values)
    inits, seeds = _listed(values, "init", ["copying"]), _seeds(values)
    axes = _axes(values)
    settled = StudyData(folder)
    bases = [
        SizeCells(
            values.get("run") or {}, size, seed, folder / "cells", schedule, axes, words, settled
        )
        for size in _sizes(values)
        for schedule in _listed(values, "schedule", [None])
        for seed in seeds
    ]
    kinds = kind_keys(bases)
    for base in bases:
        base.distinguish(kinds)
    if not bases:
        raise ConfigError(f"sizes: got none in {path}; accepted: a list of sizes")
    pilot, asked = None, values.get("pilot")
    if asked is not None or PILOT in taus:
        _check_keys(asked or {}, PILOT_KEYS, "pilot.")
        first = {base.name: base for base in reversed(bases)}  # of each size
        pilot = grid_pilot(asked or {}, list(first.values())[::-1], arms, inits[0], folder)
    cells: dict[str, Cell] = {}
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
                tuple(overrides))  # fmt: skip


def _warnings(cells: dict[str, Cell]) -> list[str]:
    """Of each cell, which is checked."""
    warnings = []
    for cell in cells.values():
        try:
            found = check_run(cell.config, smallest_world(cell.config))
        except ConfigError as error:
            raise ConfigError(f"cell {cell.name}: {error}") from None
        warnings += [f"{cell.name}: {warning}" for warning in found]
    return warnings


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"GRID: no file {path}; accepted: the path of a YAML file")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"GRID: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"GRID: {path} holds no mapping; accepted: {', '.join(_KEYS)}")
    return values


def _with_overrides(
    values: dict[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The file's values with the words of its keys, and the words of the cells' configuration."""
    changed, words = OmegaConf.create(values), []
    for word in overrides:
        key, value = split_word(word)
        if key in ("run.name", "run.dir", "run.seed"):
            raise ConfigError(f"{key}: got {value!r}; accepted: study.name, study.dir, seeds")
        # schedule.name=… is the cells', schedule=[…] the grid's
        own = key in _KEYS or key.split(".")[0] in ("study", "expansion", "pilot")
        if not own or key == "run":
            words.append(word)
            continue
        try:
            OmegaConf.update(changed, key, value, merge=False)
        except (OmegaConfBaseException, IndexError, TypeError, AttributeError):
            raise ConfigError(f"{key}: unknown key; accepted: {', '.join(_KEYS)}") from None
    plain = OmegaConf.to_container(changed)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}, words


def _axes(values: dict[str, Any]) -> dict[str, list[str]]:
    spread = values.get("expansion") or {}
    _check_keys(spread, EXPANSION_KEYS, "expansion.")
    # in one order, whatever the file's: names of cells follow it
    axes = {key: _listed(spread, key, [], "expansion.") for key in EXPANSION_KEYS if key in spread}
    return {key: [str(value) for value in found] for key, found in axes.items()}


def _taus(values: dict[str, Any]) -> list[Any]:
    taus = _listed(values, "tau", [0.8])
    for tau in taus:
        if tau != PILOT and (isinstance(tau, bool) or not isinstance(tau, int | float)):
            raise ConfigError(f"tau: got {tau!r}; accepted: fractions, steps, or {PILOT}")
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
    seeds = _listed(values, "seeds", [1])
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigError(f"seeds: got {seed!r}; accepted: integers")
    return seeds


def _retries(study: dict[str, Any]) -> int:
    retries = study.get("retries", 2)
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ConfigError(f"study.retries: got {retries!r}; accepted: an integer from 0")
    return retries


def _listed(values: dict[str, Any], key: str, default: list[Any], prefix: str = "") -> list[Any]:
    found = values.get(key, default)
    if not isinstance(found, list):
        raise ConfigError(f"{prefix}{key}: got {found!r}; accepted: a list")
    return found


def _check_keys(values: Any, known: tuple[str, ...], prefix: str) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.')}: got {values!r}; accepted: a mapping")
    for key in values:
        if key not in known:
            raise ConfigError(f"{prefix}{key}: unknown key; accepted: {', '.join(known)}")
