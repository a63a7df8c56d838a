"""A run's saved checkpoints evaluated on downstream tasks while it trains on.

Each evaluation is an ``mprog eval`` in a process of its own, of the lowest priority, started by
rank 0 and never more than one at a time. Whatever becomes of it, the run only says so in a line.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_progressive.checkpoints.checkpoint import checkpoint_path, checkpoints, step_of
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.evaluation.names import check_tasks
from megatron_progressive.evaluation.results import (
    FOLDER,
    checksum_of,
    file_name,
    read_result,
    read_results,
    results_folder,
    scores_of,
)
from megatron_progressive.models import TRANSFORMERS
from megatron_progressive.runtime.signals import StopFlag
from megatron_progressive.runtime.tied import start_tied

_POLL_SECONDS = 0.5
_END_SECONDS = 10.0
"""How many seconds an evaluation that is ended has to remove what it was making."""
_OF_A_JOB = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
    r"|(SLURM|PMI|PMIX|OMPI)_\w+"
)
"""Variables by which a process takes itself for a rank of a job."""

Record = Callable[[int, dict[str, float]], None]
"""Called with the step of a checkpoint, and its scores by task and metric."""
Say = Callable[[int, str], None]
"""Called with a step and a line for the user."""


def check_eval_tasks(config: RunConfig, looks_up: bool = True) -> None:
    """Check ``train.eval_tasks`` and the keys beside it.

    Args:
        looks_up: whether to look for the tasks, which takes seconds; one process of a job does.

    Raises:
        ConfigError: a key is there without tasks, the model is none of language, there is no
            checkpoint at such steps, the harness is missing, or a task is not known.
    """
    train = config.train
    if not train.eval_tasks:
        for key in ("eval_tasks_every", "eval_tasks_limit"):
            if getattr(train, key):
                raise ConfigError(
                    f"train.{key}: got {getattr(train, key)} without train.eval_tasks; accepted: "
                    "with tasks"
                )
        return
    if config.model.family not in TRANSFORMERS:
        raise ConfigError(
            f"train.eval_tasks: got {','.join(train.eval_tasks)} for a model of family "
            f"{config.model.family}; accepted: [], or a language model"
        )
    every = train.eval_tasks_every
    if every and (not train.save_every or every % train.save_every):
        raise ConfigError(
            f"train.eval_tasks_every: got {every} with train.save_every {train.save_every}; "
            "accepted: a multiple of it (saved checkpoints are evaluated), or 0 for the last one"
        )
    if looks_up:
        check_tasks("train.eval_tasks", train.eval_tasks)


class Evaluations:
    """The evaluations of one run, on rank 0; on other ranks, and for a run without tasks, nothing
    happens."""

    def __init__(self, config: RunConfig, active: bool) -> None:
        self._config = config
        self._active = active and bool(config.train.eval_tasks)
        self._waiting: list[int] = []
        self._running: tuple[int, subprocess.Popen[bytes], float] | None = None
        self.record: Record = lambda step, scores: None
        self.say: Say = lambda step, line: None

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that are being evaluated or are to be: they must stay."""
        return [*([self._running[0]] if self._running else []), *self._waiting]

    def catch_up(self) -> None:
        """Evaluate what an earlier job of the run has saved and not evaluated."""
        if not self._active:
            return
        for path in checkpoints(self._config.folder):
            if self._due(step_of(path)) and not self._is_done(path):
                self._waiting.append(step_of(path))
        self.poll()

    def saved(self, step: int) -> None:
        """Evaluate the checkpoint of a step, if it is one of those that are."""
        if not self._active or not self._due(step):
            return
        # a slow evaluation must not keep ever more checkpoints: the newest one waits
        for passed in self._waiting:
            self.say(
                step,
                f"step {passed} is not evaluated: step {step} is saved, and the evaluation of an "
                "earlier one goes on (mprog eval makes up for it)",
            )
        self._waiting = [step]
        self.poll()

    def _due(self, step: int) -> bool:
        every = self._config.train.eval_tasks_every
        return step == self._config.last_step or bool(every and step % every == 0)

    def _is_done(self, checkpoint: Path) -> bool:
        limit, now = self._config.train.eval_tasks_limit, checksum_of(checkpoint)
        found = read_results(results_folder(checkpoint))
        names = {
            result["task"] for result in found
            if (result.get("checkpoint") or {}).get("checksum") == now
            and result.get("limit") == limit
        }  # fmt: skip
        return len(names) >= len(self._config.train.eval_tasks)

    def poll(self) -> None:
        """Look whether an evaluation has ended, and start the next one."""
        if self._running is not None:
            step, process, began = self._running
            code = process.poll()
            if code is None:
                return
            self._running = None
            self._ended(step, code, time.time() - began)
        if self._waiting and self._running is None:
            self._start(self._waiting.pop(0))

    def _log(self, step: int) -> Path:
        return results_folder(self._path(step)).with_suffix(".log")

    def _path(self, step: int) -> Path:
        return checkpoint_path(self._config.folder, step)

    def _command(self, step: int) -> list[str]:
        train = self._config.train
        words = ["--tasks", ",".join(train.eval_tasks), "--device", train.eval_tasks_device]
        if train.eval_tasks_limit is not None:
            words += ["--limit", str(train.eval_tasks_limit)]
        return ["eval", str(self._path(step)), *words]

    def _start(self, step: int) -> None:
        words = [sys.executable, "-m", "megatron_progressive", *self._command(step)]
        if (nice := shutil.which("nice")) is not None:
            words = [nice, "-n", "19", *words]
        environment = {k: v for k, v in os.environ.items() if not _OF_A_JOB.fullmatch(k)}
        if self._config.train.eval_tasks_device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        try:
            (self._config.folder / FOLDER).mkdir(exist_ok=True)
            with open(self._log(step), "wb") as log:
                process = start_tied(words, environment, stdout=log, stderr=log)
        except OSError as error:
            self.say(step, f"the evaluation of step {step} could not be started: {error}")
            return
        self._running = (step, process, time.time())

    def _ended(self, step: int, code: int, seconds: float) -> None:
        folder = results_folder(self._path(step))
        limit = self._config.train.eval_tasks_limit
        if code:
            lines = self._log(step).read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
            self.say(step, f"the evaluation of step {step} failed: {last.strip()[:300]} "
                     f"({self._log(step)})")  # fmt: skip
            return
        scores = {
            f"{score.task}/{score.metric}": score.value
            for file in sorted(folder.glob("*.json"))
            if (result := read_result(file)) and file.name == file_name(result["task"], None, limit)
            for score in scores_of(result)
        }
        self.record(step, {**scores, "seconds": seconds})

    def wait(self) -> None:
        """Wait for the evaluations that are left once the run has finished. A signal that asks the
        job to stop ends them; a line then names the command that makes up for them."""
        if not self.steps:
            return
        self.say(self.steps[0], f"waiting for the evaluation of step {self.steps[-1]}")
        with StopFlag() as flag:
            while self.steps and not flag.raised:
                self.poll()
                time.sleep(_POLL_SECONDS)
        for step in self.steps:
            words = " ".join(self._command(step))
            self.say(step, f"step {step} is not evaluated; mprog {words} makes up for it")

    def close(self) -> None:
        """End the evaluation that goes on, if one does."""
        self._waiting = []
        if self._running is None:
            return
        process = self._running[1]
        self._running = None
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def evaluations(config: RunConfig, active: bool) -> Iterator[Evaluations]:
    """The evaluations of a run; no process is left when the context ends."""
    found = Evaluations(config, active)
    try:
        yield found
    finally:
        found.close()


__all__ = ["Evaluations", "check_eval_tasks", "evaluations"]
