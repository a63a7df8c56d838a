"""TensorBoard and Weights & Biases beside ``metrics.jsonl``: the same numbers, which are off by
default.

Both write inside the run folder and need no network: Weights & Biases runs offline unless
``WANDB_MODE`` says otherwise (``wandb sync RUN/wandb/offline-run-…`` sends it later). Only rank 0
has trackers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Protocol

from megatron_progressive.config import ConfigError, RunConfig

EVENTS = ("train", "eval", "expansion", "tasks")
"""The events of ``metrics.jsonl`` that trackers get."""


class Tracker(Protocol):
    """A tracker takes numbers by name (``train/loss``) at steps."""

    def log(self, numbers: dict[str, float], step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class TensorBoardTracker:
    """A tracker that writes event files in ``RUN/tensorboard``. A resumed run adds a file, whose
    steps replace those that were done after its checkpoint."""

    def __init__(self, config: RunConfig, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = None if resumed_step is None else resumed_step + 1
        self._writer: Any = SummaryWriter(  # type: ignore[no-untyped-call]
            str(config.folder / "tensorboard"), purge_step=first
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A tracker that writes a run of Weights & Biases in ``RUN/wandb``; a resumed run has the same
    id there."""

    def __init__(self, config: RunConfig, resumed_step: int | None) -> None:
        import wandb

        place = str(config.folder.resolve())
        for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):  # else in the user's home
            os.environ.setdefault(variable, f"{place}/wandb")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "megatron_progressive"),
            name=config.run.name,
            id=hashlib.blake2b(place.encode(), digest_size=8).hexdigest(),
            dir=place,
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            resume="allow",
        )
        # an own axis: Weights & Biases' steps cannot go back to a checkpoint
        self._run.define_metric("*", step_metric="step")

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log({**numbers, "step": step})

    def flush(self) -> None:
        pass  # it writes by itself

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[RunConfig, int | None], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


def check_trackers(config: RunConfig) -> None:
    """Check that the packages of ``train.trackers`` are installed.

    Raises:
        ConfigError: one of them is not.
    """
    for name in config.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.trackers: got {name}, whose package is not installed; accepted: after pip "
                f"install {name}, or without it"
            )


class Trackers:
    """The trackers of a run, which get its events."""

    def __init__(self, config: RunConfig, resumed_step: int | None) -> None:
        self._trackers = [TRACKERS[name](config, resumed_step) for name in config.train.trackers]

    def event(self, kind: str, values: dict[str, Any]) -> None:
        """Pass on the numbers of an event; anything else in it is left out."""
        if kind not in EVENTS:
            return
        further = {
            f"{name}/{number}": value
            for name, one in values.get("sets", {}).items()
            for number, value in one.items()
        }
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in {**values, **further}.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for tracker in self._trackers:
            tracker.log(numbers, int(values["step"]))

    def flush(self) -> None:
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
