"""The run folder: its configuration, metrics and summary, and what resuming does to them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from megatron_progressive.checkpoints.checkpoint import TrainingPosition, read_position
from megatron_progressive.checkpoints.resuming import newest_described
from megatron_progressive.config import CONFIG_FILE, ConfigError, RunConfig, load, to_yaml
from megatron_progressive.runs import files as run_files
from megatron_progressive.runs.decisive import decisive
from megatron_progressive.runs.extension import branch, extends, set_aside
from megatron_progressive.runs.files import METRICS_FILE, SUMMARY_FILE, read_summary
from megatron_progressive.runs.trackers import Trackers
from megatron_progressive.runtime.files import json_text, write_atomically, write_json, writing
from megatron_progressive.runtime.folder_lock import LOCK_NAME

DAMAGED_FILE = "metrics.damaged"
"""The file with the lines of ``metrics.jsonl`` that could not be read when the run was resumed, as
they were."""

# What a run that has not begun yet may have left, or is writing.
_OWN = (LOCK_NAME, f".{CONFIG_FILE}.")


def check_folder(config: RunConfig) -> TrainingPosition | None:
    """Where a run would start: the position from which to resume, or None for a fresh start.
    Nothing is created.

    Creates nothing.

    Raises:
        ConfigError: the folder holds something else, another configuration, or checkpoints of which
            none is whole.
    """
    folder = config.folder
    if not folder.exists():
        return None
    if (folder / CONFIG_FILE).is_file():
        return _checked(config, folder)
    if not folder.is_dir() or any(not path.name.startswith(_OWN) for path in folder.iterdir()):
        raise ConfigError(f"run.name: {folder} is there and is no run folder; accepted: a new name")
    return None


def _checked(config: RunConfig, folder: Path) -> TrainingPosition | None:
    before = load(folder / CONFIG_FILE, resolved=True)
    if extends(config, before):
        return read_position(branch(folder, before))
    present, wanted = decisive(before), decisive(config)
    for key in sorted({*present, *wanted}):
        if present.get(key) != wanted.get(key):
            longer = ", or run.extend=true with more steps" if key == "train.steps" else ""
            raise ConfigError(
                f"run.name: {folder} holds a run with {key}={present.get(key)!r}, got "
                f"{wanted.get(key)!r}; accepted: the same configuration, or a new run.name{longer}"
            )
    return newest_described(folder)


def is_finished(config: RunConfig) -> bool:
    """Whether the run has ended (its summary is written last) with its last step or a later one,
    and has a result. A run that is to be extended has not."""
    file = config.folder / CONFIG_FILE
    if config.run.extend and file.is_file() and extends(config, load(file)):
        return False
    return run_files.is_finished(read_summary(config.folder)[0], config.last_step)


def look(config: RunConfig) -> tuple[TrainingPosition | None, bool]:
    """Where a run would start (:func:`check_folder`), and whether it is finished already.

    Raises:
        ConfigError: see :func:`check_folder`; also where the run is to stop before the step that it
            has reached.
    """
    position, finished = check_folder(config), is_finished(config)
    if position is not None and not finished and position.step > config.last_step:
        raise ConfigError(
            f"train.stop_after: got {config.train.stop_after}; accepted: from {position.step}, "
            f"where {config.folder} is"
        )
    return position, finished


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The events of a run so far (:func:`.runs.files.read_metrics`)."""
    return run_files.read_metrics(folder).events


def _done(event: dict[str, Any], position: TrainingPosition, config: RunConfig) -> bool:
    """Whether an event lies before a checkpoint. A checkpoint made right before an expansion lies
    before the validation of that step, too."""
    step, taus = event.get("step", 0), config.expansion_steps()
    expands_again = taus[position.expansions : position.expansions + 1] == [position.step]
    if step == position.step and expands_again:
        return event["event"] in ("train", "checkpoint")
    return bool(step <= position.step)


def record_late(config: RunConfig, kind: str, values: dict[str, Any]) -> None:
    """Record an event of a run that has finished, when its :class:`Recorder` is closed."""
    with (
        writing(f"writing {config.folder / METRICS_FILE}"),
        open(config.folder / METRICS_FILE, "a") as file,
    ):
        file.write(json_text({"event": kind, **values}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    trackers = Trackers(config, config.last_step)
    trackers.event(kind, values)
    trackers.close()


class Recorder:
    """The one writer of the run folder. Only rank 0 has one that writes; those of other ranks do
    nothing."""

    def __init__(self, config: RunConfig, position: TrainingPosition | None, writes: bool) -> None:
        """Make the folder ready to go on after ``position``. This is to be called once that
        position has loaded, because what came after it is given up (or set aside, where the run is
        extended)."""
        self.folder = config.folder
        self.notes: list[str] = []
        """What the user should be told about an extension."""
        self.warnings: list[str] = []
        """What was wrong with the files of the folder."""
        self.validation: dict[str, Any] | None = None
        """The validation of the step after which the run goes on, where that step has been
        validated."""
        self._file: TextIO | None = None
        if not writes:
            return
        with writing(f"making {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._set_aside(config, position)
        shown = replace(config, run=replace(config.run, extend=False))
        write_atomically(self.folder / CONFIG_FILE, to_yaml(shown))
        self._remove_summary()
        metrics = run_files.read_metrics(self.folder)
        if position is not None and metrics.damaged:
            with open(self.folder / DAMAGED_FILE, "ab") as file:
                file.writelines(line + b"\n" for line in metrics.damaged.values())
                file.flush()
                os.fsync(file.fileno())
            self.warnings.append(f"{metrics.describe_damage()}, and kept in {DAMAGED_FILE}")
        # Steps after the checkpoint are going to be done again: no step twice.
        kept = [e for e in metrics.events if position and _done(e, position, config)]
        if position is not None:
            self.validation = run_files.validation_at(kept, position.step)
        text = "".join(json_text(event) + "\n" for event in kept)
        write_atomically(self.folder / METRICS_FILE, text)
        self._file = open(self.folder / METRICS_FILE, "a")  # noqa: SIM115 (closed in close)
        self._trackers = Trackers(config, position.step if position else None)

    def _set_aside(self, config: RunConfig, position: TrainingPosition | None) -> None:
        file = self.folder / CONFIG_FILE
        if position is None or not file.is_file():
            return
        before = load(file)
        if extends(config, before):
            aside = set_aside(self.folder, before, position)
            self.notes.append(
                f"extended from {before.train.steps} to {config.train.steps} steps; what came "
                f"after step {position.step} is in {aside}"
            )

    def _remove_summary(self) -> None:
        """Remove the summary of a run that was stopped early and goes on, or one that has no result
        in it."""
        summary, problem = read_summary(self.folder)
        if problem:
            self.warnings.append(problem)
        elif summary is not None and run_files.finite(summary.get("final_eval_loss")) is None:
            self.warnings.append(
                f"{SUMMARY_FILE} has no validation loss that is a number: written anew at the end"
            )
        (self.folder / SUMMARY_FILE).unlink(missing_ok=True)

    def event(self, kind: str, **values: Any) -> None:
        """Append one event to ``metrics.jsonl``."""
        if self._file is not None:
            with writing(f"writing {self.folder / METRICS_FILE}"):
                self._file.write(json_text({"event": kind, **values}) + "\n")
                self._file.flush()
            self._trackers.event(kind, values)

    def sync(self) -> None:
        """Flush the metrics to disk, which is done before a checkpoint: that must not be ahead of
        them."""
        if self._file is not None:
            with writing(f"writing {self.folder / METRICS_FILE}"):
                os.fsync(self._file.fileno())
            self._trackers.flush()

    def summary(self, **values: Any) -> None:
        """Write ``summary.json``, which says that the run is finished."""
        if self._file is not None:
            self.sync()
            write_json(self.folder / SUMMARY_FILE, values)

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with writing(f"writing {self.folder / METRICS_FILE}"):
                file.close()  # writes what a full disk has not taken
            self._trackers.close()


__all__ = ["Recorder", "check_folder", "is_finished", "look", "read_metrics", "record_late"]
