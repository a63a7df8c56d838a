"""The cells of a study with their runs, sorted into *families*: what cells of several sizes and
seeds have in common (an arm, and what of τ, initialisation and schedule the grid varies)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_progressive.config import ConfigError
from megatron_progressive.data import DataIdentity, differ
from megatron_progressive.study.cells import (
    FIXED,
    FUNCTION_PRESERVING,
    G_STACK,
    GRADUAL_STACK,
    ONE_LAYER,
    SHORT,
    ZERO_LAYER,
    Cell,
    params_of,
)
from megatron_progressive.study.grid_data import data_key
from megatron_progressive.study.grid_state import CellStatus, Study
from megatron_progressive.study.runs import Run, read_run

WORDS = {
    FIXED: "fixed-size", SHORT: "short control", ZERO_LAYER: "zero-layer", ONE_LAYER: "one-layer",
    G_STACK: "G_stack", GRADUAL_STACK: "gradual stacking",
    FUNCTION_PRESERVING: "function-preserving",
}  # fmt: skip
"""The arms, as a reader meets them."""

MEANING = {
    FIXED: "the full depth from the first step",
    SHORT: "the full depth from scratch with its own complete schedule, for as many steps as give "
    "it the total FLOPs of the run that it controls",
    ZERO_LAYER: "starts with no layers, only what is before and behind them, and grows to the full "
    "depth at τ",
    ONE_LAYER: "starts with one layer (of a ResNet: one block in each stage) and grows to the full "
    "depth at τ",
    G_STACK: "starts with a quarter of the layers and stacks four copies of them at 10 % of the "
    "steps (Du et al. 2024)",
    GRADUAL_STACK: "a quarter, half and all of the layers for a third of the steps each (Gong et "
    "al. 2019)",
    FUNCTION_PRESERVING: "one layer grown at τ so that the loss does not change: copies whose last "
    "linear layers are zero",
}


@dataclass(frozen=True)
class Result:
    """One cell and what there is of its run."""

    status: CellStatus
    family: str
    params: int
    """Of its last model."""
    run: Run | None
    """None where it has not begun, or its folder cannot be read."""
    problem: str = ""
    """Why its folder cannot be read."""

    @property
    def cell(self) -> Cell:
        return self.status.cell

    @property
    def loss(self) -> float | None:
        """Final validation loss, nats per token or image, of a finished cell."""
        return None if self.run is None else self.run.final_loss

    @property
    def flops(self) -> float | None:
        """Total training FLOPs of a finished cell."""
        return None if self.run is None else self.run.total_flops


def gather(study: Study) -> list[Result]:
    """Every cell of a study in the grid's order."""
    cells = study.grid.cells
    labels = families(cells)
    trained_on: dict[str, DataIdentity | None] = {}
    found = []
    for cell in cells:
        run, problem = None, ""
        if not cell.unknown and (cell.folder / "metrics.jsonl").is_file():
            try:
                run = read_run(cell.folder)
            except ConfigError as error:
                problem = str(error)
        status = study.status_of(cell)
        if run is not None:
            key = data_key(cell.config)
            trained_on[key] = cell.trained_on or trained_on.get(key) or run.trained_on
        if run is not None and differ(run.trained_on, trained_on[key]):
            run, problem = None, "trained on other data than the study"
        found.append(Result(status, labels[cell.name], params_of(cell), run, problem))
    return found


def families(cells: Sequence[Cell]) -> dict[str, str]:
    """The family of each cell, by the cell's name."""
    axes = {cell.name: _axes(cell) for cell in cells}
    labels: dict[str, str] = {}
    for cell in cells:
        if cell.control_of is not None:
            continue
        same = [axes[other.name] for other in cells if other.arm == cell.arm]
        varied = [
            text
            for index, text in enumerate(axes[cell.name])
            if len({other[index] for other in same}) > 1
        ]
        labels[cell.name] = " ".join([WORDS[cell.arm], *varied])
    for cell in cells:
        if cell.control_of is not None:
            labels[cell.name] = f"{WORDS[SHORT]} of {labels[cell.control_of]}"
    return labels


def _axes(cell: Cell) -> tuple[str, str, str]:
    expansion = cell.config.expansion
    return (
        f"τ={cell.tau}" if cell.tau else "",
        expansion[-1].init if expansion else "",
        cell.config.schedule.name,
    )


def of_families(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each family: fixed-size first, then those that grow, controls last."""
    order = {FIXED: 0, SHORT: 2}
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: order.get(r.cell.arm, 1)):
        found.setdefault(result.family, []).append(result)
    return found


def sizes_of(results: Sequence[Result]) -> dict[str, int]:
    """Parameters at full depth of each size, from the smallest."""
    found = {result.cell.size: result.params for result in results}
    return dict(sorted(found.items(), key=lambda item: item[1]))
