"""Reading run folders; :mod:`.files` describes their format."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_progressive.config import CONFIG_FILE, ConfigError, RunConfig, load
from megatron_progressive.config.places import check_readable
from megatron_progressive.cost import flops
from megatron_progressive.data import DATA_FILE, DataIdentity, read_identity
from megatron_progressive.models import model_shape, parameter_count
from megatron_progressive.models.base import ModelShape
from megatron_progressive.runs.files import (
    METRICS_FILE,
    SUMMARY_FILE,
    Metrics,
    finite,
    read_metrics,
    read_summary,
)

_FIELDS = {
    "train": ("step", "flops", "loss", "lr"),
    "eval": ("step", "tokens", "flops", "loss", "bits_per_byte"),
}


@dataclass(frozen=True)
class Curve:
    """Values by step, in order, as float64 arrays of one length by name."""

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
    """Every step, with ``step``, cumulative ``flops``, ``loss`` (nats per token or image) and
    ``lr``."""
    evals: Curve
    """The validations on held-out text, with ``step``, ``tokens``, ``flops``, ``loss`` and
    ``bits_per_byte`` (NaN where that is not known)."""
    sets: dict[str, Curve] = field(default_factory=dict)
    """Those on each further validation set, by its name."""
    expansions: list[dict[str, Any]] = field(default_factory=list)
    """The ``expansion`` events."""
    warnings: list[str] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    """The content of ``summary.json``; None where the run has not finished."""
    trained_on: DataIdentity | None = None
    """The content of its data; None where a version that did not record this ran it."""

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def last_step(self) -> int:
        """The number of steps recorded so far."""
        return int(self.train["step"][-1]) if len(self.train) else 0

    @property
    def final_loss(self) -> float | None:
        """The final validation loss; None where the run has not finished."""
        return None if self.summary is None else _number(self.summary.get("final_eval_loss"))

    @cached_property
    def planned_flops(self) -> int:
        """The training FLOPs of the whole run, counted from its configuration."""
        return flops.total_flops(self.config)

    @property
    def total_flops(self) -> float | None:
        """The training FLOPs as recorded; None where the run has not finished."""
        return None if self.summary is None else _number(self.summary.get("total_flops"))

    @property
    def train_wall(self) -> float | None:
        """The seconds of training steps and expansion pauses; None where the run has not finished.

        Start-up, validation and saving are left out, since they are alike for every arm and would
        hide the difference in a short run.
        """
        recorded = None if self.summary is None else _number(self.summary.get("train_wall_s"))
        if recorded is None:
            return None
        return recorded + sum(_number(e.get("seconds")) or 0.0 for e in self.expansions)

    @cached_property
    def target(self) -> ModelShape:
        """The shape of the model that the run ends with."""
        depth = self.config.expansion[-1].to_layers if self.config.expansion else None
        return model_shape(self.config, depth)

    @property
    def unit(self) -> str:
        """What its samples are made of: ``tokens`` or ``images``."""
        return self.target.unit

    @property
    def depths(self) -> list[int]:
        """The number of layers in each phase, as configured."""
        return [
            model_shape(self.config).num_layers,
            *(e.to_layers for e in self.config.expansion),
        ]

    @property
    def params(self) -> list[int]:
        """The number of all parameters in each phase."""
        return [parameter_count(model_shape(self.config, depth)) for depth in self.depths]

    @property
    def step_tokens(self) -> int:
        """The number of tokens (or images) in a step."""
        return flops.step_tokens(self.target, self.config)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def read_run(folder: Path) -> Run:
    """Read one run folder. A last line of metrics that a kill has cut is left out; a damaged line,
    or a damaged summary, is named in :attr:`Run.warnings`.

    Raises:
        ConfigError: there is no run folder, it has no metrics, or its configuration cannot be read.
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
    metrics = _metrics(folder)
    events, evals = metrics.events, _curve(metrics.events, "eval")
    summary, problem = _summary(folder, evals)
    said = [_warning(e) for e in events if e["event"] == "warning"]
    return Run(
        folder=folder,
        config=config,
        train=_curve(events, "train"),
        evals=evals,
        sets=_sets(metrics.events),
        expansions=[e for e in events if e["event"] == "expansion"],
        warnings=[*said, *filter(None, (metrics.describe_damage(), problem))],
        summary=summary,
        trained_on=read_identity(folder / DATA_FILE),
    )


def _metrics(folder: Path) -> Metrics:
    found = read_metrics(folder)
    if not found.events:
        what = "has no line that can be read" if found.damaged else "is empty"
        raise ConfigError(
            f"RUN: {folder / METRICS_FILE} {what}; accepted: the metrics of a run that has started"
        )
    return found


def _curve(events: list[dict[str, Any]], kind: str) -> Curve:
    names = _FIELDS[kind]
    rows = {}
    for event in events:
        if event["event"] != kind:
            continue
        values = tuple(_number(event.get(name)) for name in names)
        # a diverged run may write a loss that is null: not a number, but a step all the same
        row = tuple(float("nan") if value is None else value for value in values)
        rows[row[0]] = row  # the last one counts, should a step be there twice
    table = np.array([rows[step] for step in sorted(rows)], dtype=np.float64)
    table = table.reshape(-1, len(names))
    return Curve({name: table[:, i] for i, name in enumerate(names)})


def _sets(events: list[dict[str, Any]]) -> dict[str, Curve]:
    evals = [e for e in events if e["event"] == "eval" and isinstance(e.get("sets"), dict)]
    names = dict.fromkeys(name for event in evals for name in event["sets"])
    return {
        name: _curve([{**e, **_numbers(e["sets"].get(name))} for e in evals], "eval")
        for name in names
    }


def _numbers(found: Any) -> dict[str, Any]:
    own = found if isinstance(found, dict) else {}
    return {key: own.get(key) for key in ("loss", "bits_per_byte")}


def _warning(event: dict[str, Any]) -> str:
    step = event.get("step")
    text = event.get("message") or event.get("cause") or "unnamed"
    return f"step {step}: {text}" if step else str(text)


def _summary(folder: Path, evals: Curve) -> tuple[dict[str, Any] | None, str]:
    """The summary of a run, and what is wrong with it. A summary without a validation loss that is
    a number does not count, unless that is what the last validation found: then the run has
    diverged."""
    summary, problem = read_summary(folder)
    if summary is None or finite(summary.get("final_eval_loss")) is not None:
        return summary, problem
    last = evals["loss"][evals["step"] == summary.get("steps")]
    if len(last) and not np.isfinite(last[-1]):
        return summary, ""
    return None, f"{SUMMARY_FILE} has no validation loss: started again, the run ends with one"
