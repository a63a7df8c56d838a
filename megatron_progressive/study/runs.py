"""Read run folders (their format: README.md, "A run")."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_progressive.config import ConfigError, RunConfig, load
from megatron_progressive.config.places import check_readable
from megatron_progressive.models import model_shape, parameter_count
from megatron_progressive.models.base import ModelShape
from megatron_progressive.study import flops

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE = "config.yaml", "metrics.jsonl", "summary.json"
_FIELDS = {
    "train": ("step", "flops", "loss", "lr"),
    "eval": ("step", "tokens", "flops", "loss"),
}


@dataclass(frozen=True)
class Curve:
    """Values by step, in order: float64 arrays of one length, by name."""

    values: dict[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.values["step"])

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.values[name]


@dataclass(frozen=True)
class Run:
    """One run folder, finished or not."""

    folder: Path
    config: RunConfig
    train: Curve
    """Every step: ``step``, cumulative ``flops``, ``loss`` (nats per token or image), ``lr``."""
    evals: Curve
    """Validations: ``step``, ``tokens``, ``flops``, ``loss``."""
    expansions: list[dict[str, Any]] = field(default_factory=list)
    """``expansion`` events."""
    warnings: list[str] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    """``summary.json``; None where the run has not finished."""

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def last_step(self) -> int:
        """Steps recorded so far."""
        return int(self.train["step"][-1]) if len(self.train) else 0

    @property
    def final_loss(self) -> float | None:
        """Final validation loss; None where the run has not finished."""
        return None if self.summary is None else _number(self.summary.get("final_eval_loss"))

    @cached_property
    def planned_flops(self) -> int:
        """Training FLOPs of the whole run, counted from its configuration."""
        return flops.total_flops(self.config)

    @property
    def total_flops(self) -> float | None:
        """Training FLOPs, as recorded; None where the run has not finished."""
        return None if self.summary is None else _number(self.summary.get("total_flops"))

    @property
    def train_wall(self) -> float | None:
        """Seconds of training steps and expansion pauses; None where it has not finished.

        Start-up, validation and saving are left out: they are alike for every arm and would
        hide the difference in a short run.
        """
        recorded = None if self.summary is None else _number(self.summary.get("train_wall_s"))
        if recorded is None:
            return None
        return recorded + sum(_number(e.get("seconds")) or 0.0 for e in self.expansions)

    @cached_property
    def target(self) -> ModelShape:
        """The model that the run ends with."""
        depth = self.config.expansion[-1].to_layers if self.config.expansion else None
        return model_shape(self.config, depth)

    @property
    def unit(self) -> str:
        """``tokens`` or ``images``."""
        return self.target.unit

    @property
    def depths(self) -> list[int]:
        """Layers of each phase, as configured."""
        return [
            model_shape(self.config).num_layers,
            *(e.to_layers for e in self.config.expansion),
        ]

    @property
    def params(self) -> list[int]:
        """Parameters of each phase, all of them."""
        return [parameter_count(model_shape(self.config, depth)) for depth in self.depths]

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, or images."""
        return flops.step_tokens(self.target, self.config)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def read_run(folder: Path) -> Run:
    """Read one run folder. A last metrics line that a kill has cut is left out.

    Raises:
        ConfigError: no run folder, no metrics in it, or a file that cannot be read.
    """
    check_readable("RUN", folder)
    if not folder.is_dir():
        raise ConfigError(f"RUN: no folder {folder}; accepted: a run folder")
    for name in (CONFIG_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"RUN: {folder} has no {name}; accepted: a run folder")
        check_readable("RUN", folder / name)
    try:
        config = load(folder / CONFIG_FILE, resolved=True)
    except ConfigError as error:
        raise ConfigError(f"RUN: {folder / CONFIG_FILE}: {error}") from None
    events = _events(folder / METRICS_FILE)
    return Run(
        folder=folder,
        config=config,
        train=_curve(events, "train", folder),
        evals=_curve(events, "eval", folder),
        expansions=[e for e in events if e.get("event") == "expansion"],
        warnings=[_warning(e) for e in events if e.get("event") == "warning"],
        summary=_summary(folder / SUMMARY_FILE),
    )


def _events(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(errors="replace").splitlines()
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ConfigError(
                f"RUN: {path} line {number} is not JSON; accepted: one object a line"
            ) from None
        if not isinstance(event, dict):
            raise ConfigError(f"RUN: {path} line {number} is no object; accepted: one a line")
        events.append(event)
    if not events:
        raise ConfigError(f"RUN: {path} is empty; accepted: the metrics of a run that has started")
    return events


def _curve(events: list[dict[str, Any]], kind: str, folder: Path) -> Curve:
    names = _FIELDS[kind]
    rows = {}
    for event in events:
        if event.get("event") != kind:
            continue
        values = tuple(_number(event.get(name)) for name in names)
        # a diverged run may write a loss that is null: not a number, but a step all the same
        row = tuple(float("nan") if value is None else value for value in values)
        if values[0] is None:
            raise ConfigError(
                f"RUN: {folder / METRICS_FILE}: a {kind} event has no step; "
                f"accepted: {', '.join(names)}"
            )
        rows[row[0]] = row  # the last one counts, should a step be there twice
    table = np.array([rows[step] for step in sorted(rows)], dtype=np.float64)
    table = table.reshape(-1, len(names))
    return Curve({name: table[:, i] for i, name in enumerate(names)})


def _warning(event: dict[str, Any]) -> str:
    step = event.get("step")
    text = event.get("message") or event.get("cause") or "unnamed"
    return f"step {step}: {text}" if step else str(text)


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        loaded = json.loads(path.read_text())
    except ValueError:
        loaded = None
    if not isinstance(loaded, dict):
        raise ConfigError(f"RUN: {path} is not a JSON object; accepted: what the run wrote")
    return loaded
