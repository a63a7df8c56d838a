"""The run folder: configuration, metrics and summary, and what resuming does to them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from megatron_progressive.config import CONFIG_FILE, ConfigError, RunConfig, load, to_yaml
from megatron_progressive.models.decisive import decisive
from megatron_progressive.runtime.files import write_atomically, write_json, writing
from megatron_progressive.state.checkpoint import Progress
from megatron_progressive.state.resuming import newest_described
from megatron_progressive.train.trackers import Trackers

METRICS_FILE, SUMMARY_FILE = "metrics.jsonl", "summary.json"


def check_folder(config: RunConfig) -> Progress | None:
    """Where a run would start: the progress to resume from, or None for a fresh start.

    Creates nothing.

    Raises:
        ConfigError: the folder holds something else, another configuration, or checkpoints of
            which none is whole.
    """
    folder = config.folder
    if not folder.exists():
        return None
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file()):
        raise ConfigError(f"run.name: {folder} is there and is no run folder; accepted: a new name")
    if not any(folder.iterdir()):
        return None
    present = decisive(load(folder / CONFIG_FILE))
    wanted = decisive(config)
    for key in sorted({*present, *wanted}):
        if present.get(key) != wanted.get(key):
            raise ConfigError(
                f"run.name: {folder} holds a run with {key}={present.get(key)!r}, got "
                f"{wanted.get(key)!r}; accepted: the same configuration, or a new run.name"
            )
    return newest_described(folder)


def is_finished(config: RunConfig) -> bool:
    """Whether the run ended (its summary is written last), with its last step or a later one."""
    path = config.folder / SUMMARY_FILE
    if not path.is_file():
        return False
    steps = json.loads(path.read_text()).get("steps")
    return isinstance(steps, int) and steps >= config.last_step


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Events of a run so far; a last line cut by a kill is left out."""
    path = folder / METRICS_FILE
    events = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def _done(event: dict[str, Any], progress: Progress, config: RunConfig) -> bool:
    """Whether an event lies before a checkpoint. One made right before an expansion lies
    before that step's validation too."""
    step, taus = event.get("step", 0), config.expansion_steps()
    expands_again = taus[progress.expansions : progress.expansions + 1] == [progress.step]
    if step == progress.step and expands_again:
        return event["event"] in ("train", "checkpoint")
    return bool(step <= progress.step)


class Recorder:
    """Writes the run folder. Only rank 0 has one that writes; the others' do nothing."""

    def __init__(self, config: RunConfig, progress: Progress | None, writes: bool) -> None:
        self.folder = config.folder
        self._file: TextIO | None = None
        if not writes:
            return
        with writing(f"making {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / CONFIG_FILE, to_yaml(config))
        # of a run that was stopped early and goes on
        (self.folder / SUMMARY_FILE).unlink(missing_ok=True)
        # Steps after the checkpoint are going to be done again: no step twice.
        kept = [e for e in read_metrics(self.folder) if progress and _done(e, progress, config)]
        text = "".join(json.dumps(event) + "\n" for event in kept)
        write_atomically(self.folder / METRICS_FILE, text)
        self._file = open(self.folder / METRICS_FILE, "a")  # noqa: SIM115 (closed in close)
        self._trackers = Trackers(config, progress.step if progress else None)

    def event(self, kind: str, **values: Any) -> None:
        """Append one event to ``metrics.jsonl``."""
        if self._file is not None:
            with writing(f"writing {self.folder / METRICS_FILE}"):
                self._file.write(json.dumps({"event": kind, **values}) + "\n")
                self._file.flush()
            self._trackers.event(kind, values)

    def sync(self) -> None:
        """Flush to disk: called before a checkpoint, which must not be ahead of the metrics."""
        if self._file is not None:
            with writing(f"writing {self.folder / METRICS_FILE}"):
                os.fsync(self._file.fileno())
            self._trackers.flush()

    def summary(self, **values: Any) -> None:
        """Write ``summary.json``: the run is finished."""
        if self._file is not None:
            self.sync()
            write_json(self.folder / SUMMARY_FILE, values)

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with writing(f"writing {self.folder / METRICS_FILE}"):
                file.close()  # writes what a full disk has not taken
            self._trackers.close()


__all__ = ["Recorder", "check_folder", "is_finished", "read_metrics"]
