"""What a plan says of a cluster, as lines of at most 100 columns."""

from __future__ import annotations

import itertools
import textwrap
from dataclasses import fields
from typing import TYPE_CHECKING

from megatron_progressive.cost.cluster import RESERVE
from megatron_progressive.cost.step_time import StepTime
from megatron_progressive.plan.shell_words import command_lines

if TYPE_CHECKING:
    from megatron_progressive.plan.plan import ClusterPlan, Plan

_WIDTH = 100
_GIB = 2**30


def cluster_parts(plan: Plan, on: ClusterPlan) -> list[list[str]]:
    """Blocks of lines: the memory at the peak, the time, and the words of layouts that were
    searched."""
    parts = [_memory(plan, on), _time(plan, on)]
    return [*parts, _words(on)] if on.found is not None else parts


def _note(text: str) -> list[str]:
    wrapped = textwrap.wrap(text, _WIDTH - 2, break_on_hyphens=False)
    return [f"  {line}" for line in wrapped]


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"


def _memory(plan: Plan, on: ClusterPlan) -> list[str]:
    from megatron_progressive.runtime.text import aligned

    usable = on.cluster.usable_bytes
    rows = [["Phase", "stage", "state", "activations", "temporary", "peak", "left"]]
    for index, (planned, peak) in enumerate(zip(plan.phases, on.peaks, strict=True)):
        kept = peak.activations
        sizes = [peak.state.total, kept.kept, kept.temporary, peak.total, usable - peak.total]
        stage = f"{peak.state.stage + 1} of {planned.layout.pipeline}"
        rows.append([str(index + 1), stage, *(_gib(size) for size in sizes)])
    gpu = on.cluster
    lines = [f"Memory at the peak of a step, GiB, of {plan.world} {gpu.gpu}"]
    lines += aligned(rows)
    lines += _note(
        f"micro-batch {plan.config.train.micro_batch}; usable: {usable / _GIB:.1f} = "
        f"{100 * (1 - RESERVE):.0f} % of {gpu.memory_gib:g}; activations of Transformer Engine's "
        f"layers{_recomputed(plan)}: NOT measured on a GPU"
    )
    pairs = itertools.pairwise(peak.state.total for peak in on.peaks)
    most = max((before + after for before, after in pairs), default=0)
    if most:
        lines += _note(f"at τ the old and the new state are held at once: {_gib(most)}")
    return lines


def _recomputed(plan: Plan) -> str:
    """That nothing is computed anew, where that is so; the phases' layouts say what is."""
    none = all(planned.layout.recompute == "none" for planned in plan.phases)
    return ", nothing recomputed" if none else ""


def _time(plan: Plan, on: ClusterPlan) -> list[str]:
    from megatron_progressive.runtime.text import aligned

    names = [field.name for field in fields(StepTime)]
    rows = [["Phase", "s/step", *names, "hours"]]
    hours = []
    for index, (planned, time) in enumerate(zip(plan.phases, on.times, strict=True)):
        hours.append(planned.phase.steps * time.total / 3600)
        cells = [f"{seconds:.3g}" for seconds in (time.total, *(getattr(time, n) for n in names))]
        rows.append([str(index + 1), *cells, f"{hours[-1]:,.1f}"])
    total = sum(hours)
    gpu = on.cluster
    lines = ["Expected time", *aligned(rows, gap=2)]
    lines += _note(f"total {total:,.1f} hours, {total * plan.world:,.0f} GPU-hours")
    for expansion in plan.expansions:
        pause = expansion.reshard.seconds(plan.link_gb_per_s)
        drawing = expansion.reshard.drawing_seconds(plan.cores)
        lines += _note(
            f"pause at step {expansion.step:,}: {pause:.3g} s of resharding, {drawing:.3g} s of "
            f"drawing initial values, and building"
        )
    lines += _note(
        f"an estimate from data sheets, NOT measured: {gpu.peak_tflops:g} TFLOP/s dense bf16 x "
        f"{100 * gpu.mfu:g} % (assumed) while computing; NVLink {gpu.nvlink_gb_per_s:g}, network "
        f"{gpu.network_gb_per_s:g} GB/s a GPU each way; half of the data-parallel traffic hidden"
    )
    return lines


def _words(on: ClusterPlan) -> list[str]:
    assert on.found is not None
    lines = [f"Layouts, the best of {on.found.fitting:,} that fit of {on.found.tried:,}"]
    return lines + command_lines(on.words, _WIDTH, "  ", "      ")
