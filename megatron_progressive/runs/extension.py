"""``run.extend``: a run with a WSD schedule gets more steps, as if it had had them from the start.

The run goes on from before its decay. What both schedules share until then makes the same bits: the
steps of the warmup and of the expansions, which are therefore those of the configuration that the
run has had so far.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_progressive.checkpoints.checkpoint import TrainingPosition, checkpoints, step_of
from megatron_progressive.config import CONFIG_FILE, ConfigError, RunConfig, load
from megatron_progressive.optim.schedule import (
    decay_steps,
    last_stable_step,
    rewarm_steps,
    warmup_steps,
)
from megatron_progressive.runs.decisive import decisive
from megatron_progressive.runs.files import METRICS_FILE
from megatron_progressive.runtime.files import fsync_path


def resolved(config: RunConfig) -> RunConfig:
    """The configuration that ``run.extend`` makes of ``config``, in which warmup and expansions are
    at the steps where the run in the folder has them. Without ``run.extend`` it is ``config``
    itself.

    Raises:
        ConfigError: there is no run in the folder, its schedule falls all along, there are no more
            steps than it has, or something else has changed.
    """
    if not config.run.extend:
        return config
    folder = config.folder
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"run.extend: got true, and no run is in {folder}; accepted: false for a new run"
        )
    present = load(folder / CONFIG_FILE, resolved=True)
    if present.schedule.name != "wsd":
        raise ConfigError(
            f"run.extend: got true for a run with schedule.name {present.schedule.name}, whose "
            f"learning rate falls all along; accepted: wsd"
        )
    # The file that is given may still be the one that the run began with.
    earlier = [
        load(path, resolved=True) for path in sorted(folder.glob(f"{_until('*')}/{CONFIG_FILE}"))
    ]
    known = extends(config, present)  # resolved already
    if not known and not any(_same_but_for_steps(config, one) for one in (present, *earlier)):
        key, was, got = _difference(config, present)
        raise ConfigError(
            f"run.name: {folder} holds a run with {key}={was!r}, got {got!r}; accepted: with "
            f"run.extend more train.steps, and all else as it was"
        )
    steps, before = config.train.steps, present.train.steps
    if steps < before or (steps == before and not earlier):
        raise ConfigError(
            f"train.steps: got {steps} with run.extend; accepted: more than the {before} of the "
            f"run in {folder}"
        )
    return _extended(present, config)


def _same_but_for_steps(config: RunConfig, other: RunConfig) -> bool:
    return decisive(_with_steps(config, other.train.steps)) == decisive(other)


def _with_steps(config: RunConfig, steps: int) -> RunConfig:
    return replace(config, train=replace(config.train, steps=steps))


def _difference(config: RunConfig, present: RunConfig) -> tuple[str, object, object]:
    mine, theirs = decisive(_with_steps(config, present.train.steps)), decisive(present)
    key = next(key for key in sorted(mine.keys() | theirs) if mine.get(key) != theirs.get(key))
    return key, theirs.get(key), mine.get(key)


def _extended(present: RunConfig, config: RunConfig) -> RunConfig:
    """The configuration ``config`` with the steps of warmup and expansions that ``present`` has."""
    if config.train.steps == present.train.steps:
        schedule, taus = present.schedule, [e.at for e in present.expansion]
    else:
        climb = rewarm_steps(present) / config.train.steps if present.schedule.rewarm else None
        schedule = replace(
            config.schedule, warmup=warmup_steps(present) / config.train.steps,
            rewarm=config.schedule.rewarm if climb is None else climb,
        )  # fmt: skip
        taus = [float(step) for step in present.expansion_steps()]
    expansion = [replace(e, at=at) for e, at in zip(config.expansion, taus, strict=True)]
    return replace(config, schedule=schedule, expansion=expansion)


def extends(config: RunConfig, present: RunConfig) -> bool:
    """Whether ``config``, as :func:`resolved` gave it, is ``present`` with more steps."""
    return (
        config.run.extend
        and config.train.steps > present.train.steps
        and len(config.expansion) == len(present.expansion)
        and decisive(_extended(present, config)) == decisive(config)
    )


def branch(folder: Path, present: RunConfig) -> Path:
    """The newest checkpoint of a run folder that a longer schedule shares with the present one.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    saved, last = checkpoints(folder), last_stable_step(present)
    shared = [path for path in saved if step_of(path) <= last]
    if not shared:
        there = ", ".join(str(step_of(path)) for path in saved) or "none"
        raise ConfigError(
            f"run.extend: {folder} has checkpoints of steps: {there}, and its decay begins after "
            f"step {last}; accepted: a checkpoint of that step or before (train.save_every makes "
            f"them)"
        )
    return shared[-1]


def kept_for_extension(config: RunConfig, step: int) -> list[int]:
    """The steps of the checkpoints that pruning at ``step`` must leave for an extension: once the
    decay has begun, the newest one from before it."""
    last = last_stable_step(config)
    if not decay_steps(config) or step <= last:
        return []
    return [step_of(path) for path in checkpoints(config.folder) if step_of(path) <= last][-1:]


def set_aside(folder: Path, present: RunConfig, position: TrainingPosition) -> Path:
    """Keep in ``until_STEPS`` what the run has come to after ``position``: copies of its files, and
    the checkpoints themselves. Returns that folder. This may be done again where it was
    interrupted.
    """
    later = [path for path in checkpoints(folder) if step_of(path) > position.step]
    for aside in _names(folder, present.train.steps):
        if not aside.exists():
            break
        metrics = [place / METRICS_FILE for place in (aside, folder)]
        if not later and all(file.is_file() for file in metrics):
            one, other = (file.read_bytes() for file in metrics)
            if one == other:  # all was done but for what comes after it
                return aside
    hidden = aside.with_name(f".{aside.name}.tmp")
    (hidden / "checkpoints").mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            shutil.copy2(file, hidden / file.name)
            fsync_path(hidden / file.name)
    for path in later:
        os.rename(path, hidden / "checkpoints" / path.name)
    for place in (folder / "checkpoints", hidden / "checkpoints", hidden):
        fsync_path(place)
    os.rename(hidden, aside)
    fsync_path(folder)
    return aside


def _until(steps: str) -> str:
    return f"until_{steps}"


def _names(folder: Path, steps: int) -> Iterator[Path]:
    name, number = _until(f"{steps:07d}"), 1
    yield folder / name
    while True:
        number += 1
        yield folder / f"{name}_{number}"
