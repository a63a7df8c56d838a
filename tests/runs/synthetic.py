"""Run folders with plausible made-up curves, for tests of the report and for looking at it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_progressive.config import RunConfig, from_dict, to_yaml
from megatron_progressive.cost.flops import step_flops, step_tokens
from megatron_progressive.data import DATA_FILE, DataIdentity
from megatron_progressive.grid.cell_runs import one_a_run
from megatron_progressive.grid.cells import ALONE, Cell
from megatron_progressive.grid.grid import Grid
from megatron_progressive.models import model_shape, parameter_count
from megatron_progressive.optim.schedule import learning_rate
from megatron_progressive.plan.controls import fixed_size, never_grown, short_control
from megatron_progressive.runtime.files import write_json


def progressive_config(folder: Path, **expansion: Any) -> RunConfig:
    """A tiny run, zero to six layers at 0.8 T unless ``expansion`` says otherwise."""
    return from_dict(
        {
            "run": {"name": "tiny", "dir": str(folder)},
            "model": {"family": "gpt2", "preset": "tiny", "num_layers": 0},
            "train": {"steps": 300, "eval_every": 10},
            "expansion": [{"at": 0.8, "to_layers": 6, **expansion}],
        }
    )


def four_arms(folder: Path, final: dict[str, float] | None = None, **more: Any) -> dict[str, Path]:
    """Progressive, fixed-size, short control and never grown, each ending at its ``final`` loss."""
    config = progressive_config(folder)
    ends = {"progressive": 2.56, "fixed": 2.50, "short": 2.62, "never": 2.7, **(final or {})}
    (never,) = never_grown(config)
    configs = {
        "progressive": config, "fixed": fixed_size(config), "short": short_control(config),
        "never": never,
    }  # fmt: skip
    return {arm: write_run(c, ends[arm], **more) for arm, c in configs.items()}


def write_run(
    config: RunConfig, final: float, stop_at: int | None = None, finished: bool = True,
    seconds_per_tflop: float = 0.05, warning: str | None = None, content: str = "",
) -> Path:  # fmt: skip
    """Write the folder of one run whose validation loss ends exactly at ``final``.

    The curve falls like a power law above a floor, by a part of its height with the decay of
    the learning rate, spikes at each expansion and relaxes exponentially. ``content`` is the
    fingerprint of its data, which is not recorded where there is none.
    """
    folder = config.folder
    folder.mkdir(parents=True)
    if content:
        identity = DataIdentity(content, config.data.corpus, "0" * 64, "/gone")
        write_json(folder / DATA_FILE, identity.to_values())
    (folder / "config.yaml").write_text(to_yaml(config))
    random_ = random.Random(config.run.seed)
    steps, taus = config.train.steps, config.expansion_steps()
    depths = [model_shape(config).num_layers, *(e.to_layers for e in config.expansion)]
    shape = model_shape(config)
    classes = getattr(shape, "padded_vocab_size", None) or getattr(shape, "num_classes", 0)
    start = math.log(classes)
    flops, wall, lines = 0.0, 0.0, []
    peak, scale = config.optim.lr, 0.008 * steps

    def loss_at(step: int) -> float:
        phase = sum(tau < step for tau in taus)
        undecayed = final + 0.12 + (start - final) * (1 + step / scale) ** -0.62
        undecayed += 0.75 if phase < len(taus) else 0.0
        if phase:
            undecayed += 2.2 * math.exp(-(step - taus[phase - 1]) / (0.025 * steps))
        decayed = max(0.0, 1 - learning_rate(config, step) / peak) if step > steps / 2 else 0.0
        return (
            undecayed - 0.12 * decayed - (start - final) * 0.35 * decayed * (step / scale) ** -0.62
        )

    offset = final - loss_at(steps)
    for step in range(1, (stop_at or steps) + 1):
        phase = sum(tau < step for tau in taus)
        shape = model_shape(config, depths[phase])
        one = step_flops(shape, config)
        flops += one
        seconds = one * seconds_per_tflop / 1e12 + 0.004
        wall += seconds
        tokens = step * step_tokens(shape, config)
        loss = loss_at(step) + offset
        common = {"step": step, "tokens": tokens, "flops": flops}
        lines.append(
            {
                "event": "train", **common, "loss": loss + random_.gauss(0, 0.06),
                "lr": learning_rate(config, step), "grad_norm": 1.0, "step_time_s": seconds,
                "tokens_per_s": 1.0, "num_layers": depths[phase],
            }
        )  # fmt: skip
        if step in taus:
            after = loss_at(step + 1) + offset
            lines.append(
                {
                    "event": "expansion", "step": step, "from_layers": depths[phase],
                    "to_layers": depths[phase + 1], "init": config.expansion[phase].init,
                    "state_policy": "inherit", "layout_before": "DP=1", "layout_after": "DP=1",
                    "seconds": 0.5, "bytes_moved": 0, "peak_bytes": 10, "loss_before": loss,
                    "loss_after": after,
                }
            )  # fmt: skip
            loss = after
        if warning and step == 1:
            lines.append({"event": "warning", "step": 1, "message": warning})
        if step % config.train.eval_every == 0 or step == steps:
            lines.append({"event": "eval", **common, "loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished and stop_at is None:
        summary = {
            "final_eval_loss": final, "total_flops": flops, "total_tokens": tokens,
            "wall_s": wall + 5, "train_wall_s": wall, "steps": steps, "resumed": False,
            "num_layers": depths[-1], "params": parameter_count(model_shape(config, depths[-1])),
        }  # fmt: skip
        write_json(folder / "summary.json", summary)  # whole, as a run's: others may be waiting
    return folder


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The same run of another seed, in its own folder."""
    name = f"{config.run.name}_seed{seed}"
    return replace(config, run=replace(config.run, seed=seed, name=name))


PLANTED = {"fixed": (1.8, 0.10), "zero_layer": (1.8, 0.115), "one_layer": (1.8, 0.11),
           "short_control": (1.8, 0.107), "never_grown": (1.8, 0.095)}  # fmt: skip
"""E and the exponent alpha of each arm's law, and A so that all meet at ``MEETING`` FLOPs."""
MEETING, MEETING_LOSS = 1e11, 4.0


def planted_loss(arm: str, flops: float) -> float:
    """``E + A / C^alpha`` of an arm, of others than those planted as of fixed-size."""
    floor, alpha = PLANTED.get(arm, PLANTED["fixed"])
    return floor + (MEETING_LOSS - floor) * (MEETING / flops) ** alpha


CROSSING_SLOPE = 0.02
"""The power of FLOPs over the crossing by which a shallow depth's loss is above the deep one's."""


def alone_loss(cell: Cell, full: int, crossing: float) -> float:
    """The loss of a depth alone: fixed-size's law at the ``full`` depth, and for a shallower one
    what crosses it at ``crossing`` FLOPs."""
    shallow = cell.config.model.num_layers < full
    factor = (cell.flops / crossing) ** CROSSING_SLOPE if shallow else 1.0
    return planted_loss("fixed", cell.flops) * factor


def write_study(
    grid: Grid, noise: float = 0.0, skip: Sequence[str] = (), crossing: float = MEETING,
    **more: Any,
) -> None:  # fmt: skip
    """Run folders of every cell that has none, on its arm's planted law; cells whose name has a
    word of ``skip`` are left out.

    Args:
        noise: standard deviation of the log loss between cells.
        crossing: where a crossing study's depths cross, in FLOPs.
    """
    random_ = random.Random(1)
    full = {one.size: one.target for one in grid.crossings}
    for cell in one_a_run(grid.cells):
        loss = (
            alone_loss(cell, full[cell.size], crossing)
            if cell.arm == ALONE
            else planted_loss(cell.arm, cell.flops)
        ) * math.exp(random_.gauss(0, noise))
        if cell.unknown or cell.folder.exists() or any(word in cell.name for word in skip):
            continue
        write_run(cell.config, loss, **more)
        path = grid.folder / "attempts" / f"{cell.config.run.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"failures": 0, "error": "", "version": "0.1.0 (abc1234)"}
        path.write_text(json.dumps(values))
