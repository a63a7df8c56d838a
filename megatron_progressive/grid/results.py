"""The cells of a study with their runs, sorted into families (:mod:`.labels`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_progressive.config import ConfigError
from megatron_progressive.data import DataIdentity, differ
from megatron_progressive.grid.cells import ALONE, FIXED, NEVER, SHORT, Cell, params_of
from megatron_progressive.grid.data import data_key
from megatron_progressive.grid.labels import families
from megatron_progressive.grid.state import CellStatus, Study
from megatron_progressive.runs.reading import Run, read_run


@dataclass(frozen=True)
class Result:
    """One cell and what there is of its run."""

    status: CellStatus
    family: str
    params: int
    """The number of parameters of its last model."""
    size_params: int
    """At the full depth of its size."""
    run: Run | None
    """Its run; None where it has not begun, or where its folder cannot be read."""
    problem: str = ""
    """Why its folder cannot be read; empty where it can."""

    @property
    def cell(self) -> Cell:
        return self.status.cell

    @property
    def loss(self) -> float | None:
        """The final validation loss of a finished cell, in nats per token or image."""
        return None if self.run is None else self.run.final_loss

    @property
    def flops(self) -> float | None:
        """The total training FLOPs of a finished cell."""
        return None if self.run is None else self.run.total_flops


def gather(study: Study) -> list[Result]:
    """Every cell of a study, in the order of the grid."""
    cells = study.grid.cells
    labels = families(cells)
    full = {cell.size: params_of(cell) for cell in cells if cell.arm not in (ALONE, NEVER)}
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
        found.append(
            Result(status, labels[cell.name], params_of(cell), full[cell.size], run, problem)
        )
    return found


def once(results: Sequence[Result]) -> list[Result]:
    """The first result of each run: cells that share a run are shown one by one, and count once."""
    first: dict[str, Result] = {}
    for result in results:
        first.setdefault(result.cell.run_name, result)
    return list(first.values())


def of_families(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each family: fixed-size or depths alone first, then families that grow,
    controls last."""
    order = {FIXED: 0, ALONE: 0, SHORT: 2, NEVER: 3}
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: order.get(r.cell.arm, 1)):
        found.setdefault(result.family, []).append(result)
    return found


def sizes_of(results: Sequence[Result]) -> dict[str, int]:
    """The number of parameters at full depth of each size, from the smallest."""
    found = {result.cell.size: result.size_params for result in results}
    return dict(sorted(found.items(), key=lambda item: item[1]))
