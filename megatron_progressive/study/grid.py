"""A scaling study as a grid: one YAML file spans sizes, arms, τ, initialisations and seeds.

A *cell* is one run. Its name says what it is, its fingerprint what decides its result: cells of
two grids that are the same run share a folder's name, and a finished one is never run again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_progressive.config import ConfigError, RunConfig, from_dict, split_word
from megatron_progressive.config.decisive import decisive
from megatron_progressive.models import model_shape
from megatron_progressive.study import controls
from megatron_progressive.study.flops import total_flops
from megatron_progressive.study.preflight import check_run, smallest_world

FIXED, SHORT = "fixed", "short_control"
ZERO_LAYER, ONE_LAYER, FUNCTION_PRESERVING = "zero_layer", "one_layer", "function_preserving"
G_STACK, GRADUAL_STACK, MULTI_STAGE = "g_stack", "gradual_stack", "multi_stage"
ARMS = (FIXED, ZERO_LAYER, ONE_LAYER, SHORT, G_STACK, GRADUAL_STACK, FUNCTION_PRESERVING,
        MULTI_STAGE)  # fmt: skip
_SOURCE = re.compile(r"([2-9]|[1-9]\d+)_layers")
"""Arms of deeper sources: ``2_layers``, ``4_layers``, ..."""

G_STACK_FACTOR, G_STACK_AT = 4, 0.1
"""Growth of G_stack: four times the layers, early (Du et al. 2024, arXiv 2405.15319)."""
GRADUAL_STAGES = 3
"""Depths L/4, L/2, L of gradual stacking, for equal numbers of steps, each growth a copy of the
layers that are there (Gong et al. 2019, "Efficient training of BERT by progressively stacking")."""
MULTI_STAGE_LAYERS = 2
"""Depth of the middle stage of multi_stage (0, 2, L), from τ / 2 on (arXiv 2511.04981)."""

_KEYS = ("study", "run", "sizes", "arms", "tau", "init", "expansion", "seeds")
_STUDY_KEYS = ("name", "dir", "retries")
_EXPANSION_KEYS = ("order", "insert", "optimizer_state")


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    name: str
    """``SIZE-ARM[-tauT-INIT[-ORDER][-INSERT][-STATE]]-sSEED``."""
    size: str
    arm: str
    seed: int
    config: RunConfig
    """``run.dir`` is the study's folder of cells, ``run.name`` the cell's folder in it."""
    control_of: str | None = None
    """Of a short control: the name of the cell whose FLOPs it has."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.config)

    @property
    def folder(self) -> Path:
        return self.config.folder

    @property
    def flops(self) -> int:
        return total_flops(self.config)


@dataclass(frozen=True)
class Grid:
    """A study: its folder and its cells."""

    name: str
    folder: Path
    cells: list[Cell]
    retries: int = 2
    """How often a failed cell is tried again."""
    warnings: list[str] = field(default_factory=list)


def fingerprint(config: RunConfig) -> str:
    """Twelve hexadecimal digits of what decides a run's result: model, data, steps, optimizer,
    schedule, expansions, seed; not its layout, which changes no more than rounding."""
    found = {key: repr(value) for key, value in decisive(config).items() if key != "run.name"}
    text = json.dumps(found, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def load_grid(path: Path, overrides: Sequence[str] = ()) -> Grid:
    """The cells of a grid file, each of them checked as ``mprog train`` would.

    Keys of the file: ``study`` (``name``, ``dir``, ``retries``), ``run`` (the configuration that
    all cells share, without expansions), ``sizes`` (a list of ``name``, ``to_layers`` and
    ``key: value`` changes), ``arms``, ``tau`` (fractions or steps), ``init`` (of sources with
    layers), ``expansion`` (lists of ``order``, ``insert``, ``optimizer_state``), ``seeds``.

    Args:
        overrides: ``key=value`` words. Those of the file's keys replace values in it
            (``study.dir=…``, ``seeds=[1,2]``), others the configuration of every cell, whatever
            ``run`` and ``sizes`` say (``train.steps=100``).

    Raises:
        ConfigError: no such file, an unknown key or arm, or a cell that cannot run.
    """
    values, words = _with_overrides(_read(path), overrides)
    _check_keys(values, _KEYS, "")
    study, spread = values.get("study") or {}, values.get("expansion") or {}
    _check_keys(study, _STUDY_KEYS, "study.")
    _check_keys(spread, _EXPANSION_KEYS, "expansion.")
    axes = {key: _listed(spread, key, [], "expansion.") for key in spread}
    name = str(study.get("name", path.stem))
    folder = Path(str(study.get("dir", "studies"))) / name
    arms = _listed(values, "arms", [FIXED, ZERO_LAYER, ONE_LAYER, SHORT])
    for arm in arms:
        if arm not in ARMS and not _SOURCE.fullmatch(str(arm)):
            raise ConfigError(f"arms: got {arm!r}; accepted: {', '.join(ARMS)}, N_layers")
    cells: dict[str, Cell] = {}
    warnings: list[str] = []
    for size in _listed(values, "sizes", []):
        for seed in _listed(values, "seeds", [1]):
            base = _SizeBase(values.get("run") or {}, size, int(seed), folder, axes, words)
            taus = _listed(values, "tau", [0.8])
            for cell in base.cells(arms, taus, _listed(values, "init", ["copying"])):
                cells[cell.name] = cell
    if not cells:
        raise ConfigError(f"sizes: got none in {path}; accepted: a list of sizes")
    for cell in cells.values():
        try:
            found = check_run(cell.config, smallest_world(cell.config))
        except ConfigError as error:
            raise ConfigError(f"cell {cell.name}: {error}") from None
        warnings += [f"{cell.name}: {warning}" for warning in found]
    return Grid(name, folder, list(cells.values()), int(study.get("retries", 2)), warnings)


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
        if key.split(".")[0] not in _KEYS or key.startswith("run."):
            words.append(word)
            continue
        try:
            OmegaConf.update(changed, key, value, merge=False)
        except (OmegaConfBaseException, IndexError, TypeError, AttributeError):
            raise ConfigError(f"{key}: unknown key; accepted: {', '.join(_KEYS)}") from None
    plain = OmegaConf.to_container(changed)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}, words


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


class _SizeBase:
    """The cells of one size and one seed."""

    def __init__(
        self, run: dict[str, Any], size: Any, seed: int, folder: Path,
        axes: dict[str, list[Any]], overrides: list[str],
    ) -> None:  # fmt: skip
        if not isinstance(size, dict) or not {"name", "to_layers"} <= size.keys():
            raise ConfigError(f"sizes: got {size!r}; accepted: mappings with name and to_layers")
        if "expansion" in run:
            raise ConfigError("run.expansion: got one; accepted: none (the arms have their own)")
        self.name, self.seed, self.layers = str(size["name"]), seed, int(size["to_layers"])
        changes = {key: value for key, value in size.items() if key not in ("name", "to_layers")}
        self._axes = axes
        words = [f"{key}={json.dumps(value)}" for key, value in changes.items()] + overrides
        words += [f"run.seed={seed}", f"run.dir={json.dumps(str(folder / 'cells'))}"]
        self._config = from_dict(run, words)

    def cells(self, arms: list[str], taus: list[float], inits: list[str]) -> Iterator[Cell]:
        progressive: list[Cell] = []
        for arm in arms:
            if arm == FIXED:
                yield self._cell(FIXED, self.layers, [])
            elif arm == ZERO_LAYER:
                progressive += self._grown(arm, 0, taus, ["random"])
            elif arm == ONE_LAYER:
                progressive += self._grown(arm, 1, taus, inits)
            elif arm == FUNCTION_PRESERVING:
                progressive += self._grown(arm, 1, taus, ["copying_zeroL"])
            elif arm == G_STACK:
                progressive.append(self._g_stack())
            elif arm == GRADUAL_STACK:
                progressive.append(self._gradual_stack())
            elif arm == MULTI_STAGE:
                progressive += self._grown(arm, MULTI_STAGE_LAYERS, taus, inits)
            elif match := _SOURCE.fullmatch(arm):
                progressive += self._grown(arm, int(match[1]), taus, inits)
        yield from progressive
        for cell in progressive if SHORT in arms else ():
            control = controls.short_control(cell.config)
            arm, source = cell.name.removeprefix(f"{self.name}-"), cell.name
            short = self._named(f"{SHORT}_of_{arm.rsplit('-s', 1)[0]}", SHORT, control)
            yield replace(short, control_of=source)

    def _named(self, what: str, arm: str, config: RunConfig) -> Cell:
        name = f"{self.name}-{what}-s{self.seed}"
        digits = fingerprint(config)
        placed = replace(config, run=replace(config.run, name=f"{name}-{digits}"))
        return Cell(name, self.name, arm, self.seed, placed)

    def _cell(self, arm: str, source: int, expansion: list[dict[str, Any]], what: str = "") -> Cell:
        values = {**asdict(self._config), "expansion": expansion}
        values["model"]["num_layers"] = source
        return self._named(what or arm, arm, from_dict(values))

    def _grown(self, arm: str, source: int, taus: list[float], inits: list[str]) -> Iterator[Cell]:
        """Cells that expand once (twice with ``multi_stage``), over all axes."""
        for tau, init in itertools.product(taus, inits):
            for choice in self._choices(source, init):
                last = {"at": tau, "to_layers": self.layers, "init": init, **choice}
                what = "-".join([arm, f"tau{tau:g}", init, *choice.values()])
                if arm == MULTI_STAGE:
                    steps = tau if tau >= 1 else tau * self._config.train.steps
                    first = {"at": max(1, round(steps / 2)), "to_layers": source, "init": "random"}
                    yield self._cell(arm, 0, [first, last], what)
                else:
                    yield self._cell(arm, source, [last], what)

    def _choices(self, source: int, init: str) -> list[dict[str, str]]:
        """Combinations of ``expansion``'s lists, without what makes no difference: the order in
        which fewer than two layers are copied, a place among none, the state of no copies."""
        copied = init.startswith("copying")
        axes = {
            key: [str(v) for v in found if copied or (key, v) != ("optimizer_state", "copy")]
            for key, found in self._axes.items()
            if (key != "order" or (copied and source > 1)) and (key != "insert" or source)
        }
        return [dict(zip(axes, c, strict=True)) for c in itertools.product(*axes.values())]

    def _g_stack(self) -> Cell:
        source = max(1, self.layers // G_STACK_FACTOR)
        expansion = {"at": G_STACK_AT, "to_layers": self.layers, "init": "copying",
                     "order": "stack", "optimizer_state": "reset"}  # fmt: skip
        return self._cell(G_STACK, source, [expansion])

    def _gradual_stack(self) -> Cell:
        depths = [max(1, self.layers // 2**k) for k in reversed(range(GRADUAL_STAGES))]
        depths = sorted(set(depths))
        expansions = [
            {"at": round((stage + 1) / len(depths), 4), "to_layers": depth, "init": "copying",
             "order": "stack", "optimizer_state": "copy"}
            for stage, depth in enumerate(depths[1:])
        ]  # fmt: skip
        return self._cell(GRADUAL_STACK, depths[0], expansions)


def params_of(cell: Cell) -> int:
    """Parameters of a cell's last model."""
    from megatron_progressive.models import parameter_count

    expansion = cell.config.expansion
    return parameter_count(model_shape(cell.config, expansion[-1].to_layers if expansion else None))
