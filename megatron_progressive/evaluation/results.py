"""Results of downstream tasks: one file for each task of a checkpoint, which says what was
evaluated; needs neither torch nor the harness.

Those of ``RUN/checkpoints/step_0001200`` are in ``RUN/evaluations/step_0001200``, so that they stay
when the checkpoint goes; those of any other model ``NAME`` are in ``NAME.evaluations`` beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_progressive.checkpoints.checkpoint import checkpoint_path, step_of
from megatron_progressive.checkpoints.contents import PROGRESS_FILE
from megatron_progressive.config import CONFIG_FILE

FOLDER = "evaluations"


def run_of(checkpoint: Path) -> Path | None:
    """The run folder of a checkpoint that is in one."""
    run = checkpoint.resolve().parent.parent
    named = checkpoint_path(run, 0).parent.name == checkpoint.resolve().parent.name
    return run if named and (run / CONFIG_FILE).is_file() else None


def results_folder(model: Path) -> Path:
    """The folder of the results of a checkpoint or of an exported model."""
    run = run_of(model)
    if run is not None:
        return run / FOLDER / model.resolve().name
    return model.resolve().with_name(f"{model.resolve().name}.{FOLDER}")


def checksum_of(checkpoint: Path) -> str | None:
    """The checksum that a checkpoint has of itself; None where there is no checkpoint."""
    try:
        values = json.loads((checkpoint / PROGRESS_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return values.get("checksum") if isinstance(values, dict) else None


def file_name(task: str, num_fewshot: int | None, limit: float | None) -> str:
    """The name of the file of a task's results, another one for each setting that changes them."""
    name = re.sub(r"[^\w.-]", "_", task)
    shots = "" if num_fewshot is None else f".{num_fewshot}-shot"
    return name + shots + ("" if limit is None else f".limit-{limit:g}") + ".json"


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    """As the harness has it, with its filter where it has one: ``acc``, ``exact_match,strict``."""
    value: float
    stderr: float | None


def scores_of(result: Mapping[str, Any]) -> list[Score]:
    """The numbers in one file of results."""
    found = []
    for task, metrics in result["metrics"].items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if name.endswith("_stderr") or name in ("sample_len", "sample_count"):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            shown = name if kind in ("", "none") else key
            spread = float(error) if isinstance(error, int | float) else None
            found.append(Score(task, shown, float(value), spread))
    return found


def read_result(file: Path) -> dict[str, Any]:
    """The results in one file; empty where it cannot be read."""
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    readable = isinstance(values, dict) and isinstance(values.get("metrics"), dict)
    return values if readable else {}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, by name of file; a file that cannot be read is left out."""
    return [values for file in sorted(folder.glob("*.json")) if (values := read_result(file))]


def results_of_run(run: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The results of a run's checkpoints with their steps, oldest first. Results of a checkpoint
    that has been made anew with other weights are left out."""
    for folder in sorted((run / FOLDER).glob("step_*")):
        if not folder.is_dir() or not folder.name.removeprefix("step_").isdecimal():
            continue
        step = step_of(folder)
        now = checksum_of(checkpoint_path(run, step))
        for result in read_results(folder):
            evaluated = (result.get("checkpoint") or {}).get("checksum")
            if now is None or evaluated == now:
                yield step, result


def settings_words(result: Mapping[str, Any]) -> str:
    """How a task was evaluated where that is not the task's own way, as ``5-shot, first 100``."""
    words = []
    if result.get("num_fewshot") is not None:
        words.append(f"{result['num_fewshot']}-shot")
    if result.get("limit") is not None:
        words.append(f"limit {result['limit']:g}")
    return ", ".join(words)


def rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Results as texts: task, settings, metric, value and standard error."""
    return [
        [
            score.task,
            settings_words(result),
            score.metric,
            f"{score.value:.4f}",
            "" if score.stderr is None else f"± {score.stderr:.4f}",
        ]
        for result in results
        for score in scores_of(result)
    ]


@dataclass(frozen=True)
class TaskRow:
    """One score of one checkpoint of a run."""

    run: str
    step: int
    num_layers: int | None
    task: str
    settings: str
    metric: str
    value: float
    stderr: float | None


def task_rows(name: str, run: Path) -> list[TaskRow]:
    """The scores of a run's checkpoints, oldest first.

    Args:
        name: the name of the run.
        run: its folder.
    """
    return [
        TaskRow(
            run=name,
            step=step,
            num_layers=(result.get("checkpoint") or {}).get("num_layers"),
            task=score.task,
            settings=settings_words(result),
            metric=score.metric,
            value=score.value,
            stderr=score.stderr,
        )
        for step, result in results_of_run(run)
        for score in scores_of(result)
    ]


HEADER = ("task", "settings", "metric", "value", "error")
"""What :func:`rows` has."""


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Results as lines of text for people."""
    lines = [list(HEADER), *rows(results)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(HEADER))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
