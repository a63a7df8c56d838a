"""A plan as plain text of at most 100 columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from megatron_progressive.cost.headroom import LAW
from megatron_progressive.cost.memory import divides_state
from megatron_progressive.models.base import MOE, TransformerShape
from megatron_progressive.models.description import expert_words, input_words, size_words
from megatron_progressive.optim.schedule import rewarm_steps
from megatron_progressive.plan.cluster_text import cluster_parts, tau_line
from megatron_progressive.plan.shell_words import command_lines
from megatron_progressive.runtime.text import _UNITS, _digits, aligned, flops_text, short_counts

if TYPE_CHECKING:  # plan.py offers render() beside make_plan()
    from megatron_progressive.plan.plan import Plan

_WIDTH = 100
_LABEL = 16
_BYTE_UNITS = {"T": "TB", "B": "GB", "M": "MB", "K": "kB", "": "B"}
_GIB = 2**30


def _line(label: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, _WIDTH - 2 - _LABEL, break_on_hyphens=False) or [""]
    return [
        f"  {label if i == 0 else '':<{_LABEL}}{part}".rstrip() for i, part in enumerate(wrapped)
    ]


def render(plan: Plan) -> str:
    """The plan as text, without a last newline."""
    parts = [_head(plan), _phase_table(plan), _memory_table(plan)]
    parts += [_reshard_table(plan)] if plan.expansions else []
    parts += cluster_parts(plan, plan.on) if plan.on is not None else []
    parts.append(_compute(plan))
    if plan.warnings:
        lines = ["Warnings"]
        for warning in plan.warnings:
            lines += textwrap.wrap(
                warning,
                _WIDTH,
                initial_indent="  - ",
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
        parts.append(lines)
    return "\n\n".join("\n".join(lines) for lines in parts)


def _head(plan: Plan) -> list[str]:
    config, shape, train = plan.config, plan.shape, plan.config.train
    phases = [p.phase for p in plan.phases]
    arrow = " → ".join
    short = short_counts([p.params_without_positions for p in plan.phases])
    tokens = plan.config.last_step * plan.step_tokens
    lines = [f"Plan of {config.run.name} ({config.model.family}, preset {config.model.preset})"]
    lines += _line("layers", arrow(str(p.num_layers) for p in phases))
    positions = any(p.params_without_positions != p.phase.params for p in plan.phases)
    apart = "  (position embedding apart, as nanoGPT counts)" if positions else ""
    lines += _line("parameters", arrow(short) + apart)
    lines += _line("", arrow(f"{p.params:,}" for p in phases) + "  (all)")
    moe = shape.moe if isinstance(shape, TransformerShape) else None
    if moe is not None:
        active = [p.active_params for p in plan.phases]
        lines += _line(
            "active", arrow(short_counts(active)) + "  (that one token is computed with)"
        )
        lines += _line("", arrow(f"{count:,}" for count in active))
    lines += _line("model", ", ".join([*size_words(shape), train.precision, config.optim.name]))
    if isinstance(shape, TransformerShape) and moe is not None:
        lines += _line("experts", ", ".join(expert_words(shape, moe)))
    lines += _line(*input_words(shape))
    per_param = tokens / plan.phases[-1].active_params if moe else tokens / phases[-1].params
    a_parameter = "an active parameter" if moe else "a parameter"
    each = f" x {shape.sample_units} {shape.unit}" if shape.sample_units > 1 else ""
    lines += _line(
        "trained on" if shape.sample_units == 1 else shape.unit,
        f"{tokens:,} = {plan.config.last_step:,} steps x {train.global_batch} "
        f"{'samples' if each else shape.unit}{each}; {_digits(per_param)} {a_parameter}",
    )
    for part in plan.draws:
        unknown = " (epochs are known once it is prepared)" if part.epochs is None else ""
        lines += _line("mixture" if part is plan.draws[0] else "", part.words() + unknown)
    for expansion in plan.expansions:
        mixing = short_counts([expansion.stable_steps * plan.step_tokens])[0]
        follow = f"; {expansion.stable_steps:,} stable steps ({mixing} {shape.unit}) follow"
        lines += _line(
            "τ",
            f"after step {expansion.step:,} ({expansion.fraction:.3f} of the run)"
            + (follow if config.schedule.name == "wsd" else ""),
        )
    rates = ", ".join(f"{p.name} {p.first_step:,}-{p.last_step:,}" for p in plan.lr_phases)
    if plan.expansions and rewarm_steps(config):
        of = "new layers" if config.schedule.rewarm_layers == "new" else "all layers"
        start = 100 * (config.schedule.rewarm_from or 0)
        rates += f"; {of} climb from {start:g} % in the {rewarm_steps(config):,} steps after τ"
    lines += _line("learning rate", f"{config.schedule.name}, peak {config.optim.lr:g}: {rates}")
    ranks = f"{plan.world} rank{'s' * (plan.world != 1)}"
    lines += _line("layout", f"{ranks}: " + arrow(str(p.layout) for p in plan.phases))
    return lines


def _phase_table(plan: Plan) -> list[str]:
    rows = [["Phase", "steps", "layers", "layout", plan.shape.unit, "FLOPs", "share"]]
    for index, planned in enumerate(plan.phases):
        phase = planned.phase
        rows.append(
            [
                str(index + 1),
                f"{phase.first_step:,}-{phase.last_step:,}",
                str(phase.num_layers),
                str(planned.layout),
                short_counts([planned.tokens])[0],
                flops_text(phase.flops),
                f"{100 * phase.flops / plan.total_flops:.1f} %",
            ]
        )
    table = aligned(rows)
    if max(len(line) for line in table) > _WIDTH:  # the layouts are named above
        table = aligned([row[:3] + row[4:] for row in rows])
    return table


def _memory_table(plan: Plan) -> list[str]:
    kinds = list(dict.fromkeys(kind for p in plan.phases for kind in p.memory.optimizer))
    rows = [["Phase", "stage", "parameters", "gradients", *kinds, "total"]]
    for index, planned in enumerate(plan.phases):
        memory = planned.memory
        sizes = [memory.parameters, memory.gradients]
        sizes += [memory.optimizer.get(kind, 0) for kind in kinds] + [memory.total]
        stage = f"{memory.stage + 1} of {planned.layout.pipeline}"
        rows.append([str(index + 1), stage, *(_gib(size) for size in sizes)])
    lines = ["State of the fullest rank, GiB; activations and temporary buffers are NOT counted"]
    lines += aligned(rows)
    stores = "parameters " + plan.config.train.precision + ", everything else fp32"
    by = {False: "on every data-parallel rank", True: "divided over data-parallel ranks"}
    divided = [by[divides_state(p.layout)] for p in plan.phases]
    text = f"{stores}; optimizer state {' → '.join(dict.fromkeys(divided))}"
    kinds_of_layers = {kind for kinds in plan.shape.stacks().values() for kind in kinds}
    if MOE in kinds_of_layers and any(p.layout.expert > 1 for p in plan.phases):
        text += "; experts over expert-parallel ranks, their state over those that hold the same"
    lines += textwrap.wrap(text, _WIDTH - 2, break_on_hyphens=False)
    if plan.expansions:
        lines.append(tau_line(plan, [planned.memory.total for planned in plan.phases], _gib))
    return [lines[0]] + [line if line.startswith("  ") else f"  {line}" for line in lines[1:]]


def _reshard_table(plan: Plan) -> list[str]:
    rows = [["After step", "received", "mean", "sent", "mean", "total", "time"]]
    for expansion in plan.expansions:
        moved = expansion.reshard
        sizes: list[float] = []
        for counts in (moved.received, moved.sent):
            sizes += [int(counts.max()), float(counts.mean())]
        sizes.append(moved.total)
        seconds = f"{moved.seconds(plan.link_gb_per_s):.3g} s"
        rows.append([f"{expansion.step:,}", *(_bytes_text(size) for size in sizes), seconds])
    note = (
        "received and sent: by the rank with most, then the mean over ranks; each rank gets what "
        "it lacks, once; time: of the busiest rank where each sends and receives "
        f"{plan.link_gb_per_s:g} GB/s at once; building the new model is NOT counted"
    )
    lines = textwrap.wrap(note, _WIDTH - 2, break_on_hyphens=False)
    for expansion in plan.expansions:
        moved, cores = expansion.reshard, plan.cores
        lines += textwrap.wrap(
            f"after step {expansion.step:,} the busiest rank draws "
            f"{short_counts([int(moved.drawn.max())])[0]} initial values on its host: "
            f"{moved.drawing_seconds(cores):.3g} s on {cores} core{'s' * (cores > 1)}",
            _WIDTH - 2,
            break_on_hyphens=False,
        )
    return ["Bytes between ranks at τ", *aligned(rows), *(f"  {line}" for line in lines)]


def _bytes_text(size: float) -> str:
    """A number of bytes in powers of 1000, as link speeds are given: ``1.50 GB``."""
    factor, unit = next((f, u) for f, u in _UNITS if size >= f or f == 1.0)
    return f"{size / factor:.3g} {_BYTE_UNITS[unit]}"


def _gib(size: int) -> str:
    gib = size / _GIB
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.4f}"


def _compute(plan: Plan) -> list[str]:
    lines = ["Compute"]
    newton_schulz = f"{100 * plan.optimizer_flops_share:.1f} %"
    lines += _line(
        "this run", f"{flops_text(plan.total_flops)} FLOPs, {newton_schulz} of it Newton-Schulz"
    )
    if plan.fixed_flops is None or plan.saving_percent is None or plan.short_steps is None:
        return lines + _line("saving", "none: the run has no expansion")
    ratio = plan.fixed_flops / plan.total_flops
    lines += _line("fixed-size", f"{flops_text(plan.fixed_flops)} FLOPs at equal steps")
    lines += _line("saving", f"{plan.saving_percent:.1f} % predicted ({ratio:.2f}x fewer FLOPs)")
    steps = f"{plan.short_steps:,} step{'s' * (plan.short_steps != 1)}"
    lines += _line(
        "short control",
        f"{steps} of the target from scratch for as many FLOPs",
    )
    never = " and ".join(
        f"{count:,} step{'s' * (count != 1)} of {layers} layer{'s' * (layers != 1)}"
        for layers, count in plan.never_grown
    )
    lines += _line(
        "never grown",
        f"{never} alone, for as many FLOPs{' each' * (len(plan.never_grown) > 1)}: growing pays "
        "only where it ends below the short control and below the source that is never grown, "
        "over several seeds",
    )
    if plan.headroom_percent is not None:
        lines += _line(
            "headroom",
            f"the short control is expected to end {plan.headroom_percent:.1f} % above fixed-size "
            f"({LAW}; other data and optimizers differ): about as much as growing can win",
        )
    for expansion in plan.expansions:
        lines += _line(
            "theory",
            f"{expansion.lr_share:.3f} of the summed learning rate falls up to step "
            f"{expansion.step:,}: the gap grows with it (a guide, not a guarantee)",
        )
    lines += ["", "Controls"]
    for words in plan.controls:
        command = ["mprog", "train", "CONFIG", *words]
        lines += command_lines(command, _WIDTH, "  ", "      ")
    return lines
