"""A small study whose losses lie on planted laws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from megatron_progressive.grid.grid import load_grid
from megatron_progressive.grid.state import Study

SIZES = [
    {"name": f"w{width}", "to_layers": 4, "model.hidden_size": width} for width in (16, 32, 64, 96)
]


GROWN = ["zero_layer", "one_layer"]


def study_of(folder: Path, **changes: Any) -> Study:
    values: dict[str, Any] = {
        "study": {"name": "study", "dir": str(folder), "retries": 0},
        "run": {
            "model": {"family": "llama3"},
            "data": {"vocab_size": 512, "sequence_length": 32},
            "train": {"steps": 100, "global_batch": 4, "micro_batch": 4, "eval_every": 5},
        },
        "sizes": SIZES,
        "arms": ["fixed", *GROWN, "short_control"],
        "tau": [0.5],
        **changes,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(values))
    return Study(load_grid(path))


def set_loss(study: Study, name: str, loss: float) -> None:
    """Another final loss of a finished cell."""
    (cell,) = (cell for cell in study.grid.cells if cell.name == name)
    summary = json.loads((cell.folder / "summary.json").read_text())
    (cell.folder / "summary.json").write_text(json.dumps({**summary, "final_eval_loss": loss}))
