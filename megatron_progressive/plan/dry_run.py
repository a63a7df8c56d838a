"""``mprog plan --dry-run``: some ranks of the job run on the stand-in CUDA device, each alone, with
the real engines; memory is what torch's allocator counts, not a formula's."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_progressive import standin
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.cost.activations import stage_activations
from megatron_progressive.cost.memory import stage_memory
from megatron_progressive.models import model_shape
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.runtime.layout import Layout, make_layout

H100_GIB = 79.0
"""What an H100 of 80 GB leaves to a program."""


@dataclass(frozen=True)
class DryPhase:
    """What a rank measured in one phase of the run."""

    layout: Layout
    num_layers: int
    allocated: int
    """Bytes that torch's allocator holds for tensors between steps."""
    peak: int
    """The largest number of these bytes during a step."""
    predicted: int | None
    """What ``mprog plan --gpu`` has for the fullest rank of the stage; None for models other than
    language models."""
    seconds: float
    """Of the step on the host, whose kernels cost nothing."""
    communicators: int
    """Of NCCL, live at the end of the step."""
    groups: int
    """Process groups that torch knows then."""


@dataclass(frozen=True)
class DryExpansion:
    """What a rank measured at τ."""

    peak: int
    """The largest number of allocated bytes, of both engines and what is staged."""
    seconds: float
    """Of the host: new weights are not drawn, and copies cost nothing."""


@dataclass(frozen=True)
class DryRank:
    """One rank of the job, from its first engine to the end of its last."""

    rank: int
    layers: str
    """What the model was made of: Transformer Engine's, Megatron-core's local or torch's."""
    phases: list[DryPhase]
    expansions: list[DryExpansion]
    left: int
    """Bytes still allocated after the last engine was closed."""
    communicators_left: int
    """Communicators still live then; one is the job's own."""
    groups_left: int
    """Process groups still known then, the job's own among them."""


def check_available() -> None:
    """Refuses early, before a plan is printed.

    Raises:
        ConfigError: the stand-in device is not available here.
    """
    if reason := standin.available():
        raise ConfigError(f"--dry-run: got none here ({reason}); accepted: where it can be built")


def dry_run(
    config: RunConfig, world: int, ranks: Iterable[int] | None = None, gib: float = H100_GIB
) -> list[DryRank]:
    """Run some ranks of a job, each as the only one of its job that exists.

    NCCL answers as if the others had come; nothing is computed, so all experts get equally many
    tokens and no loss means anything.

    Args:
        config: a run that :func:`.preflight.check_run` accepts on ``world`` ranks.
        ranks: which; None: the first, one in the middle and the last.
        gib: the memory of a device.

    Raises:
        ConfigError: the stand-in device is not available here, or a rank runs out of memory.
        RuntimeError: a rank failed otherwise, with the end of what it wrote.
    """
    check_available()
    chosen = sorted({0, world // 2, world - 1} if ranks is None else set(ranks))
    with ThreadPoolExecutor(max(1, min(len(chosen), os.cpu_count() or 1))) as threads:
        lines = list(threads.map(lambda rank: _run(config, world, rank, gib), chosen))
    return [
        _of_lines(config, world, rank, found) for rank, found in zip(chosen, lines, strict=True)
    ]


def _run(config: RunConfig, world: int, rank: int, gib: float) -> list[dict[str, Any]]:
    variables = standin.environment("counting", gib=gib, alone=True)
    root = str(Path(__file__).resolve().parents[2])
    variables["PYTHONPATH"] = f"{variables['PYTHONPATH']}:{root}"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    variables.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_progressive.plan.dry_rank"],
        input=pickle.dumps((config, world, rank)), env=variables, capture_output=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]
    if done.returncode == 0:
        return lines
    last = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode == 3:
        after = lines[-1]["what"] if lines else "nothing"
        raise ConfigError(f"--dry-run: rank {rank} after {after!r}: {last[-1] if last else ''}")
    raise RuntimeError(f"--dry-run: rank {rank} failed:\n" + "\n".join(last[-15:]))


def _of_lines(config: RunConfig, world: int, rank: int, lines: list[dict[str, Any]]) -> DryRank:
    phases, expansions = [], []
    for line in lines:
        if line["what"] == "expand":
            expansions.append(DryExpansion(line["peak"], line["seconds"]))
        if line["what"] != "step":
            continue
        index = line["phase"]
        layers = config.expansion[index - 1].to_layers if index else None
        layout = make_layout(config.parallel_after(index), world)
        shape = model_shape(config, layers)
        predicted = None
        if isinstance(shape, TransformerShape):
            stage = rank // (world // layout.pipeline)  # pipeline stages are the outermost cut
            state = stage_memory(shape, config, layout)[stage].total
            activations = stage_activations(shape, config, layout, fused=True)[stage].total
            predicted = state + activations
        phases.append(
            DryPhase(
                layout, shape.num_layers, line["allocated"], line["peak"], predicted,
                line["seconds"], line["communicators"], line["groups"],
            )
        )  # fmt: skip
    last = lines[-1]
    return DryRank(
        rank, last["layers"], phases, expansions, last["allocated"], last["communicators"],
        last["groups"],
    )  # fmt: skip


def render(ranks: list[DryRank], gib: float = H100_GIB) -> str:
    """The measurements as plain text of at most 100 columns."""
    from megatron_progressive.runtime.text import aligned

    def in_gib(size: int | None) -> str:
        return "-" if size is None else f"{size / 2**30:.2f}"

    head = ["rank", "phase", "layers", "allocated", "peak", "planned", "peak at τ", "s/step"]
    rows = [[*head, "communicators", "groups"]]
    for one in ranks:
        for index, phase in enumerate(one.phases):
            at = one.expansions[index - 1].peak if index else None
            rows.append(
                [
                    str(one.rank), str(index + 1), str(phase.num_layers),
                    *(in_gib(n) for n in (phase.allocated, phase.peak, phase.predicted, at)),
                    f"{phase.seconds:.2f}", str(phase.communicators), str(phase.groups),
                ]
            )  # fmt: skip
    left = max(one.left for one in ranks)
    return "\n".join(
        [
            f"Dry run, GiB of {gib:g}: memory by torch's allocator, not by formula",
            *aligned(rows),
            "  planned: of the fullest rank of the same stage. Each rank ran alone on the stand-in",
            "  device: kernels compute nothing, seconds are the host's, new weights are not drawn,",
            f"  all experts get equally many tokens; layers: {ranks[0].layers}",
            f"  after the last engine was closed {in_gib(left)} GiB stay allocated",
        ]
    )
