"""A grid's plan, state and results as plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_progressive.study.grid import Grid, params_of
from megatron_progressive.study.grid_run import CellStatus, code_version
from megatron_progressive.study.plan_text import aligned, flops_text, short_counts


def plan(grid: Grid) -> str:
    """The cells and what they cost."""
    rows = [["Cell", "parameters", "steps", "layers", "FLOPs", "share"]]
    total = sum(cell.flops for cell in grid.cells)
    for cell in grid.cells:
        depths = [cell.config.model.num_layers, *(e.to_layers for e in cell.config.expansion)]
        share = f"{100 * cell.flops / total:.1f} %"
        rows.append(
            [cell.name, short_counts([params_of(cell)])[0], f"{cell.config.train.steps:,}",
             "→".join(map(str, depths)), flops_text(cell.flops), share]
        )  # fmt: skip
    lines = [f"Grid {grid.name}: {len(grid.cells)} cells in {grid.folder}", "", *aligned(rows), ""]
    lines.append(f"{flops_text(total)} FLOPs in all")
    if grid.warnings:
        lines += ["", "Warnings", *(f"  - {warning}" for warning in grid.warnings)]
    return "\n".join(lines)


def status(found: list[CellStatus]) -> str:
    """How far every cell is; what another version of the code made is marked."""
    current = code_version()
    rows = [["Cell", "state", "step", "failures", "loss", "version"]]
    errors = []
    for one in found:
        version, steps = one.attempts.version, one.cell.config.train.steps
        rows.append(
            [one.cell.name, one.state, f"{one.step:,}/{steps:,}", str(one.attempts.failures),
             f"{one.loss:.4f}" if one.loss is not None else "-",
             version + (" (another)" if version and version != current else "") or "-"]
        )  # fmt: skip
        if one.attempts.error:
            errors.append(f"  {one.cell.name}: {one.attempts.error}")
    states = [one.state for one in found]
    summary = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    done = sum(one.cell.flops for one in found if one.loss is not None)
    total = sum(one.cell.flops for one in found)
    lines = [*aligned(rows), "", f"{summary}; {100 * done / total:.0f} % of the FLOPs"]
    return "\n".join(lines + (["", "Last errors", *errors] if errors else []))


def results(rows: list[dict[str, Any]], folder: Path) -> str:
    """Losses of the finished cells."""
    table = [["Cell", "parameters", "FLOPs", "loss"]]
    table += [
        [row["cell"], short_counts([row["params"]])[0], flops_text(row["total_flops"]),
         f"{row['final_eval_loss']:.4f}"]
        for row in rows
    ]  # fmt: skip
    return "\n".join([*aligned(table), "", f"{folder / 'results.json'}: {len(rows)} cells"])
