"""``mprog eval``: a checkpoint, or a folder of transformers, evaluated by lm-evaluation-harness."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_progressive.checkpoints.checkpoint import newest_checkpoint, read_position
from megatron_progressive.checkpoints.contents import PROGRESS_FILE, sha256_of
from megatron_progressive.config import CONFIG_FILE, ConfigError
from megatron_progressive.config.places import check_writable
from megatron_progressive.evaluation.names import HARNESS, check_tasks
from megatron_progressive.evaluation.results import (
    checksum_of,
    file_name,
    results_folder,
    run_of,
)
from megatron_progressive.huggingface.exporting import Export, export_checkpoint, plan_export
from megatron_progressive.huggingface.folder import CONFIG_FILE as MODEL_CONFIG
from megatron_progressive.runtime.files import write_json
from megatron_progressive.runtime.progress import SECONDS_BETWEEN_LINES

_PINNED = (HARNESS, "transformers", "torch", "datasets")


@dataclass(frozen=True)
class Settings:
    """How tasks are evaluated; the harness's options of the same names."""

    num_fewshot: int | None = None
    """Number of examples before each question (default: the task's own)."""
    limit: float | None = None
    """Number of questions of each task, or below 1 the fraction of them (default: all)."""
    batch_size: str = "1"
    """Number of requests in a forward pass, or ``auto``."""
    device: str | None = None
    """torch's name of the device (default: ``cuda`` where there is one, else ``cpu``)."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that is to be evaluated, after it has been checked."""

    model: Path
    """The checkpoint, or the folder of transformers."""
    tasks: tuple[str, ...]
    settings: Settings
    out: Path
    """The folder of the results."""
    export: Export | None
    """The export to evaluate; None where ``model`` is a folder of transformers."""


def plan_evaluation(
    model: Path, tasks: Sequence[str], settings: Settings, dtype: str | None = None,
    tokenizer: Path | None = None,
) -> Evaluation:  # fmt: skip
    """Check everything. Nothing is created, and no model is loaded.

    Args:
        model: a checkpoint of a language model, a run folder (for its newest checkpoint), or a
            folder of transformers.
        tasks: names of the harness, or YAML files.
        dtype, tokenizer: of the export (:func:`.exporting.plan_export`).

    Raises:
        ConfigError: the harness is missing, a task is not known, there is no such model or it has
            no tokenizer, or results cannot be written.
    """
    check_tasks("--tasks", tasks)
    if (model / MODEL_CONFIG).is_file() and not (model / PROGRESS_FILE).exists() and not (
        model / CONFIG_FILE
    ).is_file():  # fmt: skip
        for option, value in (("--dtype", dtype), ("--tokenizer", tokenizer)):
            if value is not None:
                raise ConfigError(
                    f"{option}: got {value} for {model}, a folder of transformers; accepted: for a "
                    "checkpoint"
                )
        export, out = None, results_folder(model)
    else:
        model = newest_checkpoint(model)
        out = results_folder(model)
        export = plan_export(model, _temporary(model), dtype, tokenizer)
        if export.tokenizer is None:
            raise ConfigError(
                f"checkpoint: {model} keeps no tokenizer; accepted: with --tokenizer FOLDER"
            )
    check_writable("checkpoint", out)
    return Evaluation(model, tuple(tasks), settings, out, export)


def evaluate(plan: Evaluation) -> list[Path]:
    """Evaluate, and write one file of results for each task or group; returns these files.

    The weights are exported to a hidden folder beside the results, which is removed.

    Raises:
        ConfigError: a task's data or definition cannot be loaded, or weights are not finite.
    """
    with _ended_by_exceptions():
        found = _loadable(plan.tasks)
        if plan.export is None:
            return _evaluated(plan, plan.model, found)
        folder = plan.export.out
        for stale in folder.parent.glob(f"{_prefix(plan.model)}*{_ENDING}"):
            if not _alive(stale):
                shutil.rmtree(stale, ignore_errors=True)
        try:
            export_checkpoint(plan.export)
            return _evaluated(plan, folder, found)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


_ENDING = ".eval.tmp"


def _prefix(model: Path) -> str:
    """Of the hidden folders of this host; on another one the same number is another process."""
    return f".{model.resolve().name}.{socket.gethostname()}."


def _temporary(model: Path) -> Path:
    parent = run_of(model) or model.resolve().parent
    return parent / f"{_prefix(model)}{os.getpid()}{_ENDING}"


def _alive(temporary: Path) -> bool:
    number = temporary.name.removesuffix(_ENDING).rpartition(".")[2]
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _ended_by_exceptions() -> Iterator[None]:
    """Let SIGTERM end this process by an exception, so that what is hidden is removed."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _manager(tasks: Sequence[str]) -> Any:
    """The harness's index of tasks, without its own where all tasks are files: it has thousands."""
    from lm_eval.tasks import TaskManager

    from megatron_progressive.evaluation.names import is_file

    return TaskManager(include_defaults=not all(map(is_file, tasks)))


def _loadable(tasks: Sequence[str]) -> Any:
    """The index, once all tasks and their data have been loaded: before the model is."""
    manager = _manager(tasks)
    for task in tasks:
        try:
            manager.load([task])
        except Exception as error:  # the harness's and datasets' errors are of all kinds
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ConfigError(
                f"--tasks: got {task}, which cannot be loaded ({cause}); accepted: a task whose "
                "definition and data can be read (without a network: files, or data in the cache)"
            ) from None
    return manager


def _evaluated(plan: Evaluation, folder: Path, manager: Any) -> list[Path]:
    import torch
    from lm_eval.evaluator import simple_evaluate

    settings = plan.settings
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    pinned = sha256_of(folder, files)
    with _plain_bars(), _Truncated() as truncated:
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder)},
            tasks=list(plan.tasks),
            num_fewshot=settings.num_fewshot,
            batch_size=settings.batch_size,
            device=device,
            limit=settings.limit,
            task_manager=manager,
        )
    assert found is not None
    common = {
        "model": {"name": plan.model.resolve().name, "files": pinned},
        "checkpoint": _checkpoint(plan),
        "num_fewshot": settings.num_fewshot,
        "limit": settings.limit,
        "batch_size": settings.batch_size,
        "device": device,
        "truncated_requests": truncated.count,
        "versions": {name: importlib.metadata.version(name) for name in _PINNED},
        "seeds": {key: found["config"].get(key) for key in found["config"] if "seed" in key},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    plan.out.mkdir(parents=True, exist_ok=True)
    written = []
    for task, parts in _by_task(found).items():
        path = plan.out / file_name(task, settings.num_fewshot, settings.limit)
        write_json(path, {"task": task, **_of(found, parts), **common})
        written.append(path)
    return written


def _checkpoint(plan: Evaluation) -> dict[str, Any] | None:
    if plan.export is None:
        return None
    position = read_position(plan.model)
    return {
        "step": position.step,
        "num_layers": position.num_layers,
        "flops": position.flops,
        "checksum": checksum_of(plan.model),
    }


def _by_task(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names that the harness has results of, by task or outermost group, itself first."""
    groups = {name: list(parts) for name, parts in found.get("group_subtasks", {}).items() if parts}
    inner = {part for parts in groups.values() for part in parts}

    def below(name: str) -> list[str]:
        parts = [one for part in groups.get(name, ()) for one in below(part)]
        return list(dict.fromkeys([name, *parts]))

    results = found["results"]
    outer = [name for name in {**groups, **results} if name not in inner]
    return {name: [part for part in below(name) if part in results] for name in outer}


def _of(found: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """What was found of some tasks, and what they are: their versions, definitions and questions by
    content."""

    def table(name: str) -> dict[str, Any]:
        return {part: found[name][part] for part in parts if part in found.get(name, {})}

    samples, configs = table("samples"), table("configs")
    return {
        "metrics": table("results"),
        "higher_is_better": table("higher_is_better"),
        "n_shot": table("n-shot"),
        "n_samples": table("n-samples"),
        "task_versions": table("versions"),
        "definitions": {name: _hash(values) for name, values in configs.items()},
        "questions": {
            name: _hash(
                [[one["doc_hash"], one["prompt_hash"], one["target_hash"]] for one in asked]
            )
            for name, asked in samples.items()
        },
    }


def _hash(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class _Lines(io.TextIOBase):
    """Standard error for progress bars in a log: a line now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._last = time.monotonic()

    def write(self, text: str) -> int:
        now, line = time.monotonic(), text.strip()
        if line and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            print(f"eval: {line}", file=sys.stderr, flush=True)
        return len(text)


class _Truncated(logging.Filter):
    """The number of requests that were longer than the model's length, of each of which the harness
    has a line."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._logger = logging.getLogger("lm_eval.models.huggingface")

    def filter(self, record: logging.LogRecord) -> bool:
        is_one = "Truncating" in record.getMessage()
        self.count += is_one
        return not is_one

    def __enter__(self) -> _Truncated:
        self._logger.addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeFilter(self)
        if self.count:
            print(
                f"warning: {self.count} requests are longer than the model's sequences: their "
                "beginnings are left out",
                file=sys.stderr,
            )


@contextmanager
def _plain_bars() -> Iterator[None]:
    """Let the harness's bars be lines now and then where standard error is no terminal."""
    if sys.stderr.isatty():
        yield
        return
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from tqdm import tqdm

    plain = functools.partial(tqdm, file=_Lines(), mininterval=1, ascii=True, ncols=79)
    modules: list[Any] = [lm_eval.api.task, lm_eval.models.huggingface]
    before = [module.tqdm for module in modules]
    try:
        for module in modules:
            module.tqdm = plain
        yield
    finally:
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar
