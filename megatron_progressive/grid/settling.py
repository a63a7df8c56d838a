"""Settling what the cells of a study are trained on, before they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_progressive import data
from megatron_progressive.config import CONFIG_FILE, to_yaml
from megatron_progressive.data import DATA_FILE, read_identity
from megatron_progressive.grid.data import StudyData, data_key
from megatron_progressive.runtime.progress import Say

if TYPE_CHECKING:
    from megatron_progressive.grid.cells import Cell
    from megatron_progressive.grid.state import Study


def settled(study: Study, cells: Sequence[Cell], say: Say) -> bool:
    """Settle what the cells that are not finished are trained on.

    Returns: Whether something is settled now that was not before. Then the cells, which know what
        they are trained on, have to be read anew.

    Raises:
        ConfigError: see :meth:`StudyData.settle`.
    """
    store, anew = StudyData(study.folder), False
    pilot = study.grid.pilot.cells if study.grid.pilot is not None else []
    to_run = [cell for cell in cells if not study.finished(cell) and not study.exhausted(cell)]
    for key, config in {data_key(cell.config): cell.config for cell in to_run}.items():
        begun = [
            cell.folder
            for cell in [*pilot, *study.grid.cells]
            if data_key(cell.config) == key
            and (cell.folder / CONFIG_FILE).is_file()
            and read_identity(cell.folder / DATA_FILE) is None
        ]
        known = store.known(config)
        anew = store.settle(config, begun, say) != known or anew
    return anew


def cell_file(cell: Cell) -> str:
    """The configuration with which a cell is started, which names what it is trained on."""
    if cell.trained_on is None:
        return to_yaml(cell.config)
    return to_yaml(data.as_settled(cell.config, cell.trained_on))
