"""The training loop: batch, step, log, hook, evaluate, save."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_progressive.checkpoints import checkpoint, resuming
from megatron_progressive.checkpoints.checkpoint import TrainingPosition
from megatron_progressive.checkpoints.record import DepthHistory, record_of_run
from megatron_progressive.config import RunConfig
from megatron_progressive.cost.flops import step_flops
from megatron_progressive.data import (
    DATA_FILE,
    DataIdentity,
    as_settled,
    mix_warnings,
    open_data,
    tokens_of,
)
from megatron_progressive.engines import make_engine
from megatron_progressive.engines.base import Engine, GlobalBatch
from megatron_progressive.engines.megatron.kernels import kernels_line
from megatron_progressive.engines.step_metrics import StepMetrics
from megatron_progressive.evaluation.background import Evaluations
from megatron_progressive.expansion.hook import expand
from megatron_progressive.expansion.rewarm import shares_of_new_layers
from megatron_progressive.models import model_shape, parameter_count
from megatron_progressive.models.base import ModelShape
from megatron_progressive.optim.schedule import learning_rate
from megatron_progressive.runs.extension import kept_for_extension
from megatron_progressive.runs.folder import Recorder
from megatron_progressive.runtime.agreement import all_succeed
from megatron_progressive.runtime.files import write_json
from megatron_progressive.runtime.folder_lock import FolderLock
from megatron_progressive.runtime.late_memory import LateMemory
from megatron_progressive.runtime.layout import make_layout
from megatron_progressive.runtime.signals import StopFlag
from megatron_progressive.train import signatures
from megatron_progressive.train.console import Monitor, short_time
from megatron_progressive.train.first_state import set_first_state
from megatron_progressive.train.validation import Validation, as_event, as_summary

DONE, STOPPED = 0, 75
"""The exit codes of a run: it has finished, or it was stopped by a signal after saving."""


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why."""


class _Run:
    """One run on this rank, with everything that the loop needs under names."""

    def __init__(
        self,
        config: RunConfig,
        resumed: TrainingPosition | None,
        warnings: list[str],
        trained_on: DataIdentity,
        lock: FolderLock | None,
        damaged: dict[Path, str],
        evaluations: Evaluations,
    ) -> None:
        self.config, self.resumed, self.lock = config, resumed is not None, lock
        self.evaluations = evaluations
        self.trained_on = trained_on
        self.world, first = dist.get_world_size(), dist.get_rank() == 0
        self.taus = config.expansion_steps()
        depths = [model_shape(config).num_layers, *(e.to_layers for e in config.expansion)]
        self.costs = [step_flops(model_shape(config, depth), config) for depth in depths]
        self.position = resumed or TrainingPosition(0, 0, depths[0], 0, 0.0, 0.0, 0.0)
        settled = as_settled(config, trained_on)
        self.data = open_data(settled)
        self.validation = Validation(settled, self.data)
        self.started = time.perf_counter() - self.position.wall_s
        self.train_wall = self.position.train_wall_s
        self.found: dict[str, Any] = {}
        """The last validation, as its event has it."""
        self.evaluated: int | None = None  # after that step
        self.history: DepthHistory = ()
        with all_succeed("start"):  # nothing of the folder changes before all ranks have loaded
            self.engine = self._first_engine()
        self.recorder = Recorder(config, resumed, writes=first)
        if first:
            write_json(config.folder / DATA_FILE, trained_on.to_values())
        plan = [self.costs[sum(t < s for t in self.taus)] for s in range(1, config.last_step + 1)]
        unit = model_shape(config).unit
        self.monitor = Monitor(config, plan, self.position.step, shows=first, unit=unit)
        self.under_way: tuple[int, float, StepMetrics] | None = None  # step, learning rate, numbers
        self.clock = 0.0  # when the step under way began, or the one before it ended
        self.kernels = ""
        self._name_kernels()
        if self.resumed:
            self.recorder.event(
                "resume", step=self.position.step, layout=str(self.engine.layout), world=self.world
            )
            self.monitor.note(f"resumed after step {self.position.step} on {self.engine.layout}")
            for path, damage in damaged.items():
                aside = resuming.set_aside(path) if first else path
                self.warn(self.position.step, f"{path} is damaged: {damage}; resumed from the one "
                          f"before, kept as {aside.name}")  # fmt: skip
        for note in self.recorder.notes:
            self.monitor.note(note)
        if not self.resumed:
            warnings = [*warnings, *self.validation.warnings()]
            if config.data.mix:
                warnings += mix_warnings(config, tokens_of(trained_on))
        for warning in [*warnings, *self.recorder.warnings]:
            self.warn(self.position.step, warning)
        evaluations.say = self.warn
        evaluations.record = lambda step, scores: self.recorder.event("tasks", step=step, **scores)
        evaluations.catch_up()

    def shape(self, expansions: int) -> ModelShape:
        if expansions == 0:
            return model_shape(self.config)
        return model_shape(self.config, self.config.expansion[expansions - 1].to_layers)

    def build(self, expansions: int, memory: LateMemory | None = None) -> Engine:
        """A new engine, whose weights are unset, for the phase after that many expansions."""
        layout = make_layout(self.config.parallel_after(expansions), self.world)
        return make_engine(self.config, self.shape(expansions), layout, memory)

    def _first_engine(self) -> Engine:
        engine = self.build(self.position.expansions)
        self.history = set_first_state(engine, self.config, self.position if self.resumed else None)
        return engine

    def _name_kernels(self) -> None:
        """Say which kernels the engine uses, where this differs from what was said last."""
        line = kernels_line(self.config, self.engine.shape, self.engine.layout)
        if line != self.kernels:
            self.kernels = line
            self.monitor.note(line)

    def warn(self, step: int, cause: str) -> None:
        self.recorder.event("warning", step=step, message=cause)
        self.monitor.note(f"warning: {cause}")

    def train_step(self, step: int, wants_stop: bool) -> bool:
        """Do one optimizer step, and record the one before where a device was still at it; returns
        whether any rank is known to want to stop. Then, and where something else follows before the
        next step, this one is recorded as well."""
        size = self.config.train.global_batch
        batch = GlobalBatch(self.data.train_batch, (step - 1) * size, size)
        lr = learning_rate(self.config, step)
        shares = shares_of_new_layers(self.config, step, self.position.expansions)
        if self.under_way is None:
            self.clock = time.perf_counter()
        metrics = self.engine.train_step(batch, lr, wants_stop, shares)
        stop = self._record_step()
        self.under_way = step, lr, metrics
        if stop or not metrics.late or self._pauses_after(step):
            stop = self._record_step() or stop
        return stop

    def _record_step(self) -> bool:
        """Record the step under way, when it has ended; whether any rank wants to stop."""
        if self.under_way is None:
            return False
        (step, lr, metrics), self.under_way = self.under_way, None
        loss = metrics.loss
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.train_wall += seconds
        shape, size = self.engine.shape, self.config.train.global_batch
        tokens = size * shape.sample_units
        self.position = replace(
            self.position,
            step=step,
            samples=step * size,
            flops=self.position.flops + self.costs[self.position.expansions],
            train_wall_s=self.train_wall,
            wall_s=now - self.started,
        )
        self.recorder.event(
            "train",
            step=step,
            tokens=step * tokens,
            flops=self.position.flops,
            loss=loss,
            lr=lr,
            grad_norm=metrics.grad_norm,
            step_time_s=seconds,
            tokens_per_s=tokens / seconds,
            num_layers=shape.num_layers,
            **({} if metrics.expert_load is None else {"expert_load": metrics.expert_load}),
        )
        self.monitor.step(step, loss, lr, tokens / seconds)
        self.evaluations.poll()
        self._end_by(step, signatures.after_step(loss, metrics.grad_norm))
        return metrics.stop

    def _end_by(self, step: int, failure: str | None) -> None:
        """End the run where there is a failure."""
        if failure:
            self.warn(step, failure)
            raise TrainingFailed(f"step {step}: {failure}")

    def _pauses_after(self, step: int) -> bool:
        """Whether anything but the next step follows."""
        return self.expansion_due(step) or self._evaluates(step) or self._saves(step)

    def expansion_due(self, step: int) -> bool:
        """Whether ``step`` is the next τ."""
        done = self.position.expansions
        return done < len(self.taus) and step == self.taus[done]

    def expand(self, step: int) -> None:
        """Call the expansion hook, which replaces the engine by a deeper one, after step τ."""
        done = self.position.expansions
        config, expansion = self.config, self.config.expansion[done]
        staging = config.parallel_after(done + 1).staging_mib << 20
        build, probe = partial(self.build, done + 1), self.validation.probe()
        self.engine, event = expand(
            self.engine, expansion, build, probe, config.run.seed, done + 1, staging
        )
        self.position = replace(self.position, expansions=done + 1, num_layers=event.to_layers)
        self.history = (*self.history, (step, event.to_layers))
        self.recorder.event("expansion", step=step, **asdict(event))
        self.monitor.note(
            f"expanded {event.from_layers} → {event.to_layers} layers after step {step} "
            f"({event.layout_before} → {event.layout_after}) in {event.seconds:.2f} s, loss "
            f"{event.loss_before:.4f} → {event.loss_after:.4f}"
        )
        self._name_kernels()
        warning = signatures.after_expansion(config, step, event)
        if warning:
            self.warn(step, warning)
        self.monitor.phase()

    def _evaluates(self, step: int) -> bool:
        return step % self.config.train.eval_every == 0 or step == self.config.last_step

    def evaluate_if_due(self, step: int) -> None:
        if self._evaluates(step):
            self.evaluate(step)

    def evaluate(self, step: int) -> None:
        """Validate after ``step``, and record what that found."""
        tokens = step * self.config.train.global_batch * self.engine.shape.sample_units
        self.found, self.evaluated = as_event(self.validation.measure(self.engine)), step
        self.recorder.event(
            "eval", step=step, tokens=tokens, flops=self.position.flops, **self.found
        )
        sets = (f", {n} {one['loss']:.4f}" for n, one in self.found.get("sets", {}).items())
        self.monitor.note(
            f"step {step}/{self.config.last_step}  validation loss {self.found['loss']:.4f}"
            + "".join(sets)
        )
        self.monitor.resume_clock()

    def _saves(self, step: int) -> bool:
        every = self.config.train.save_every
        return bool(every and step % every == 0) or step == self.config.last_step

    def save_if_due(self, step: int, stop: bool) -> None:
        if stop or self._saves(step):
            self.save(step)

    def evaluate_end(self) -> None:
        """Validate after the last step, where this job has not done so: it may have ended between
        its last checkpoint and its summary, or before a step that was not to be its last one."""
        last = self.config.last_step
        if self.evaluated == last:
            return
        found = [self.recorder.validation]  # of rank 0, which has the metrics
        dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            self.evaluate(last)
        else:
            self.found, self.evaluated = found[0], last

    def check_folder_is_ours(self) -> None:
        """Check, on rank 0, that the folder is still this job's before it writes what others might
        write.

        Raises:
            TrainingFailed: the lock is gone.
        """
        if self.lock is not None and not self.lock.still_there():
            raise TrainingFailed(
                f"{self.config.folder} is no longer this job's: it was removed, or another job "
                f"took it while this one stood still"
            )

    def save(self, step: int) -> None:
        train = self.config.train
        self.check_folder_is_ours()
        self.recorder.sync()
        wall = time.perf_counter() - self.started
        self.position = replace(self.position, wall_s=wall)
        model = record_of_run(
            self.config, self.engine.shape, self.engine.layout, self.history, self.trained_on
        )
        start = time.perf_counter()
        path = checkpoint.save(
            self.engine.state(),
            self.config.folder,
            self.position,
            model,
            train.keep_checkpoints,
            protected=[*self.taus, *kept_for_extension(self.config, step), *self.evaluations.steps],
            tokenizer=self.trained_on.tokenizer_folder,
        )
        seconds = time.perf_counter() - start
        self.recorder.event("checkpoint", step=step, path=path.name, seconds=seconds)
        self.evaluations.saved(step)
        self.monitor.resume_clock()

    def finish(self) -> None:
        self.check_folder_is_ours()
        self._end_by(self.config.last_step, signatures.after_validation(self.found["loss"]))
        wall = time.perf_counter() - self.started
        self.recorder.summary(
            **as_summary(self.found),
            total_flops=self.position.flops,
            total_tokens=self.position.samples * self.engine.shape.sample_units,
            wall_s=wall,
            train_wall_s=self.train_wall,
            steps=self.position.step,
            resumed=self.resumed,
            num_layers=self.engine.shape.num_layers,
            params=parameter_count(self.engine.shape),
        )
        self.monitor.note(f"done in {short_time(wall)}, validation loss {self.found['loss']:.4f}")

    def close(self) -> None:
        self.monitor.close()
        self.recorder.close()


def train(
    config: RunConfig,
    resumed: TrainingPosition | None,
    warnings: list[str],
    trained_on: DataIdentity,
    lock: FolderLock | None = None,
    evaluations: Evaluations | None = None,
) -> int:
    """Run or continue a run, inside the world process group; returns the exit code.

    Args:
        resumed: the position of the newest checkpoint (:func:`.runs.folder.check_folder`), or None.
            Where the content of that checkpoint is damaged, the run goes on from the one before.
        warnings: what is recorded first: what preflight found in a fresh run, or what has changed
            in a run that goes on.
        trained_on: the data of the run, which is prepared (:func:`.data.settle`).
        lock: the lock of the run folder, on rank 0, which is looked at before each save.
        evaluations: of checkpoints on downstream tasks; whoever made them waits for the last ones.

    Raises:
        ConfigError: on every rank, where no checkpoint of the run is whole, or the one of
            ``run.init_from`` is not.
        TrainingFailed: a training loss or the last validation loss is not finite, or the folder is
            no longer this job's.
    """
    damaged: dict[Path, str] = {}
    if resumed is not None:
        resumed, damaged = resuming.newest_whole(config.folder, resumed.step)
    elif config.run.init_from is not None:
        resuming.check_whole(Path(config.run.init_from))
    evaluations = Evaluations(config, active=False) if evaluations is None else evaluations
    run = _Run(config, resumed, warnings, trained_on, lock, damaged, evaluations)
    try:
        with StopFlag() as flag:
            if run.expansion_due(run.position.step):  # saved right before it
                run.expand(run.position.step)
                run.evaluate(run.position.step)
            elif not run.resumed:
                run.evaluate(0)
            for step in range(run.position.step + 1, config.last_step + 1):
                stop = run.train_step(step, flag.raised)
                if run.expansion_due(step):
                    run.save(step)  # whoever resumes from it expands again, to the same bits
                    if not stop:
                        run.expand(step)
                        run.evaluate(step)
                else:
                    run.evaluate_if_due(step)
                    run.save_if_due(step, stop)
                if stop and step < config.last_step:
                    run.monitor.note(f"stopped by a signal after saving step {step}")
                    run.engine.close()
                    return STOPPED
            run.evaluate_end()
        run.finish()
        run.engine.close()  # where it failed, other ranks may not come to it
        return DONE
    finally:
        run.close()
