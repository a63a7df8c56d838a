"""What cells are called: their arms in words, and the *family* of each cell, from the axes that
make it.

A family is what cells of several sizes and seeds have in common: an arm, and the value of every
axis (:attr:`.Cell.axes`) of which the grid has several for that arm. Everything that names arms or
variants to a reader takes its words from here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_progressive.grid.cells import (
    ALONE,
    AROUND,
    BUDGET,
    DEEPER_SOURCE,
    DEPTH,
    FIXED,
    FUNCTION_PRESERVING,
    G_STACK,
    GRADUAL_STACK,
    INIT,
    MULTI_STAGE,
    MULTI_STAGE_LAYERS,
    NEVER,
    ONE_LAYER,
    PILOT,
    SCHEDULE,
    SHORT,
    TAU,
    ZERO_LAYER,
    Cell,
)
from megatron_progressive.grid.knobs import KNOBS
from megatron_progressive.models import model_shape
from megatron_progressive.plan.controls import depths_before

_ARMS = {
    FIXED: ("fixed-size", "the full depth from the first step"),
    SHORT: (
        "short control",
        "the full depth from scratch with its own complete schedule, for as many steps as give it "
        "the total FLOPs of the run that it controls",
    ),
    NEVER: (
        "never-grown",
        "a depth that the run that it controls has before the full one, from scratch with its own "
        "complete schedule, for as many steps as those FLOPs pay for",
    ),
    ALONE: (
        "depth alone",
        "one of the crossing study's two depths from scratch, with a complete schedule of as many "
        "steps as its budget pays for",
    ),
    ZERO_LAYER: (
        "zero-layer",
        "starts with no layers, only what is before and behind them, and grows to the full depth "
        "at τ",
    ),
    ONE_LAYER: (
        "one-layer",
        "starts with one layer (of a ResNet: one block in each stage) and grows to the full depth "
        "at τ",
    ),
    G_STACK: (
        "G_stack",
        "starts with a quarter of the layers and stacks four copies of them at 10 % of the steps "
        "(Du et al. 2024)",
    ),
    GRADUAL_STACK: (
        "gradual stacking",
        "a quarter, half and all of the layers for a third of the steps each (Gong et al. 2019)",
    ),
    FUNCTION_PRESERVING: (
        "function-preserving",
        "one layer grown at τ so that the loss does not change: copies whose last linear layers "
        "are zero",
    ),
    MULTI_STAGE: (
        "multi-stage",
        f"starts with no layers, grows to {MULTI_STAGE_LAYERS} at half of τ and to the full depth "
        f"at τ",
    ),
    PILOT: ("pilot", "one of the two runs that measure the mixing time"),
}

_AXES = {
    TAU: "τ={}", INIT: "{}", "order": "{}", "insert": "{} insert", "optimizer_state": "{} state",
    "block": "block {}", "rewarm": "re-warm {}", "rewarm_from": "from {}",
    "rewarm_layers": "of {} layers", "stages": "stages {}",
    SCHEDULE: "{}", "optim.name": "{}", DEPTH: "{} layers", BUDGET: "{} FLOPs",
    AROUND: "at {}x",
}  # fmt: skip
"""How the value of an axis is put into words."""
_ORDER = (DEPTH, BUDGET, TAU, INIT, *KNOBS, AROUND, SCHEDULE)


def arm_words(arm: str) -> str:
    """The name of an arm for a reader: ``zero-layer``, ``4-layer``."""
    return _of(arm)[0]


def arm_meaning(arm: str) -> str:
    """What the runs of an arm do, in words."""
    return _of(arm)[1]


def _of(arm: str) -> tuple[str, str]:
    if match := DEEPER_SOURCE.fullmatch(arm):
        return (
            f"{match[1]}-layer",
            f"starts with {match[1]} layers and grows to the full depth at τ",
        )
    return _ARMS[arm]


def families(cells: Sequence[Cell], without: Collection[str] = ()) -> dict[str, str]:
    """The family of each cell, by the cell's name: ``one-layer τ=0.3 copying``.

    Args:
        without: the axes that are left out, such as :data:`.cells.TAU`.
    """
    keys = {key for cell in cells for key in cell.axes}
    values: dict[str, dict[str, set[str]]] = {}
    for cell in cells:
        known = values.setdefault(cell.arm, {key: set() for key in keys})
        for key in keys:
            known[key].add(cell.axes.get(key, ""))
    labels: dict[str, str] = {}
    for cell in cells:
        if cell.control_of is None:
            varied = {key for key, found in values[cell.arm].items() if len(found) > 1}
            labels[cell.name] = _label(cell, varied - {*without})
    by_name = {cell.name: cell for cell in cells}
    for cell in cells:
        if cell.control_of is not None:
            stage = _stage(cell, by_name[cell.control_of])
            labels[cell.name] = f"{arm_words(cell.arm)} of {labels[cell.control_of]}{stage}"
    return labels


def _stage(control: Cell, grown: Cell) -> str:
    """Which of a run's stages has the depth of a source that never grows, where there are several
    stages. The depth itself does not tell, since another size has it in another stage."""
    depths = depths_before(grown.config)
    if control.arm != NEVER or len(depths) < 2:
        return ""
    return f", stage {1 + depths.index(model_shape(control.config).num_layers)}"


def _label(cell: Cell, varied: Collection[str]) -> str:
    keys = sorted(cell.axes, key=lambda key: _ORDER.index(key) if key in _ORDER else len(_ORDER))
    texts = [
        _AXES.get(key, f"{key.rpartition('.')[2]}={{}}").format(cell.axes[key])
        for key in keys
        if key in varied and cell.axes[key]
    ]
    return " ".join([arm_words(cell.arm), *texts])


def is_control(family: str, arm: str | None = None) -> bool:
    """Whether a family is one of controls of equal FLOPs, of ``arm`` where that is given."""
    arms = (SHORT, NEVER) if arm is None else (arm,)
    return any(family.startswith(f"{arm_words(one)} of ") for one in arms)
