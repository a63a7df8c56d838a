"""The plan, the state and the results of a grid as text, and the state also as a live table on a
terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_progressive.cost.flops import total_flops
from megatron_progressive.grid.cell_runs import one_a_run
from megatron_progressive.grid.cells import params_of
from megatron_progressive.grid.grid import Grid
from megatron_progressive.grid.pilot import ASSUMED, WAITS
from megatron_progressive.grid.state import (
    FAILED,
    FINISHED,
    NEVER_RUN,
    NOT_YET,
    RUNNING,
    CellStatus,
    code_version,
)
from megatron_progressive.runtime.text import aligned, flops_text, short_counts, time_text

_COLOURS = {
    FINISHED: "green", RUNNING: "cyan", FAILED: "red", **dict.fromkeys(NEVER_RUN, "red"),
    **dict.fromkeys(NOT_YET.values(), "yellow"),
}  # fmt: skip


def plan(grid: Grid) -> str:
    """The cells and what they cost."""
    rows = [["Cell", "index", "parameters", "steps", "layers", "τ", "FLOPs", "share"]]
    pilot = sum(total_flops(arm) for arm, _ in grid.pilot.plan.files) if grid.pilot else 0
    once = one_a_run(grid.cells)
    total = sum(cell.flops for cell in once) + pilot
    first = {cell.run_name: cell.name for cell in once}
    for index, cell in enumerate(grid.cells):
        depths = [cell.config.model.num_layers, *(e.to_layers for e in cell.config.expansion)]
        taus = "→".join(f"{step:,}" for step in cell.config.expansion_steps())
        rows.append(
            [cell.name, str(index), short_counts([params_of(cell)])[0],
             f"{cell.config.train.steps:,}", "→".join(map(str, depths)),
             _open(grid) if cell.unknown and taus else taus or "-", flops_text(cell.flops),
             f"{100 * cell.flops / total:.1f} %" if first[cell.run_name] == cell.name else "-"]
        )  # fmt: skip
    lines = [f"Grid {grid.name}: {len(grid.cells)} cells in {grid.folder}", "", *aligned(rows), ""]
    lines += [
        f"{cell.name} is the run of {first[cell.run_name]}, which is trained once"
        for cell in grid.cells
        if first[cell.run_name] != cell.name
    ]
    lines += [*_pilot_lines(grid, pilot, total), *_crossing_lines(grid, total)]
    lines.append(f"{flops_text(total)} FLOPs in all")
    if grid.warnings:
        lines += ["", "Warnings", *(f"  - {warning}" for warning in grid.warnings)]
    return "\n".join(lines)


def _pilot_lines(grid: Grid, flops: int, total: int) -> list[str]:
    if grid.pilot is None:
        return []
    found, plan = grid.pilot.finding(), grid.pilot.plan
    lines = [
        f"Pilot of {grid.pilot.size}, {grid.pilot.source}: two runs of {plan.fixed.last_step:,} of "
        f"{plan.fixed.train.steps:,} steps, {flops_text(flops)} FLOPs "
        f"({100 * flops / total:.1f} %)" + (f"; {found}" if found else "")
    ]
    waiting = [cell for cell in grid.cells if cell.unknown]
    if any(cell.unknown == WAITS for cell in waiting):
        lines.append(
            f"{len(waiting)} cells wait for it; priced with τ at {ASSUMED:g} of the stable phase's "
            f"end (and their controls to match)"
        )
    elif waiting:
        lines += [f"{len(waiting)} cells are not run: {waiting[0].unknown}"]
    return lines


def _open(grid: Grid) -> str:
    return "crossing" if grid.crossings else "pilot"


def _crossing_lines(grid: Grid, total: int) -> list[str]:
    lines = []
    for one in grid.crossings:
        flops, found = sum(cell.flops for cell in one_a_run(one.cells)), one.found()
        ends = " to ".join(flops_text(end) for end in (one.budgets[0], one.budgets[-1]))
        lines.append(
            f"Crossing of {one.size} ({one.schedule}): {one.source} and {one.target} layers alone "
            f"at {len(one.budgets)} budgets, {ends} FLOPs: {flops_text(flops)} FLOPs "
            f"({100 * flops / total:.1f} %); {one.finding(found)}"
        )
        waiting = [
            cell
            for cell in grid.cells
            if cell.unknown and (cell.size, cell.config.schedule.name) == (one.size, one.schedule)
        ]
        if waiting and found is None:
            lines.append(
                f"{len(waiting)} cells wait for it; priced around {flops_text(one.assumed)} FLOPs, "
                f"the geometric mean of the budgets (and their controls to match)"
            )
        elif waiting:
            lines.append(f"{len(waiting)} cells are not run: {waiting[0].unknown}")
    return lines


def _once(found: list[CellStatus]) -> list[CellStatus]:
    """The first cell of each run."""
    first: dict[str, CellStatus] = {}
    for one in found:
        first.setdefault(one.cell.run_name, one)
    return list(first.values())


def time_left(found: list[CellStatus]) -> tuple[float, int] | None:
    """The seconds until all cells that can run are finished, and the number of cells at a time that
    this assumes.

    The FLOPs that are left are divided by FLOPs per second: those of the finished cells of the size
    (including validations and saves), else those of its running cells, else those of all cells.
    None where nothing has run yet.
    """
    rates: dict[str, list[float]] = {}
    for size in {one.cell.size for one in found}:
        known = [one for one in found if one.cell.size == size and one.flops_per_s]
        whole = [one for one in known if one.state == FINISHED]
        if known:
            rates[size] = [one.flops_per_s or 0.0 for one in whole or known]
    if not rates:
        return None
    everywhere = [rate for same in rates.values() for rate in same]
    seconds = 0.0
    for one in _once(found):
        if one.state in (FINISHED, FAILED, *NEVER_RUN):
            continue
        same = rates.get(one.cell.size, everywhere)
        seconds += max(0.0, one.cell.flops - one.flops) * len(same) / sum(same)
    workers = max(1, sum(one.state == RUNNING for one in _once(found)))
    return seconds / workers, workers


def _summary(found: list[CellStatus]) -> str:
    states = [one.state for one in found]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    once = _once(found)
    done = sum(one.cell.flops if one.state == FINISHED else one.flops for one in once)
    total = sum(one.cell.flops for one in once)
    parts = [counts, f"{100 * done / total:.0f} % of the FLOPs"]
    left = time_left(found)
    if left is not None and left[0] > 0:
        parts.append(f"about {time_text(left[0])} left, {left[1]} at a time")
    return "; ".join(parts)


_HEADER = ["Cell", "state", "step", "failures", "loss", "version"]


def _row(one: CellStatus, current: str) -> list[str]:
    version, steps = one.attempts.version, one.cell.config.last_step
    return [
        one.cell.name, one.state, f"{one.step:,}/{steps:,}", str(one.attempts.failures),
        f"{one.loss:.4f}" if one.loss is not None else "-",
        version + (" (another)" if version and version != current else "") or "-",
    ]  # fmt: skip


def _errors(found: list[CellStatus]) -> list[str]:
    told = [one for one in found if one.why and one.state not in NOT_YET.values()]
    return [f"  {one.cell.name}: {one.why}" for one in told]


def status(found: list[CellStatus]) -> str:
    """How far every cell has come; cells that another version of the code made are marked."""
    current = code_version()
    lines = [*aligned([_HEADER, *(_row(one, current) for one in found)]), "", _summary(found)]
    errors = _errors(found)
    return "\n".join(lines + (["", "Why", *errors] if errors else []))


def _live(found: list[CellStatus], current: str) -> Group:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(_HEADER):
        table.add_column(
            name, justify="left" if index < 2 else "right", no_wrap=index > 0, overflow="fold"
        )
    for one in found:
        cells = _row(one, current)
        table.add_row(*(Text(cell, style=_COLOURS.get(one.state, "")) for cell in cells))
    errors = [Text(line, style="red") for line in _errors(found)]
    # first: a terminal that is too short cuts the end
    return Group(Text(_summary(found), style="bold"), table, *errors)


def show_status(
    look: Callable[[], list[CellStatus]], watch: bool, seconds: float = 2.0,
    console: Console | None = None,
) -> None:  # fmt: skip
    """Print the state. On a terminal it is a table, which ``watch`` prints anew every ``seconds``
    until nothing is left to run or Ctrl-C is pressed; elsewhere it is plain text, printed once."""
    console = Console() if console is None else console
    if not console.is_terminal:
        print(status(look()), file=console.file)
        return
    current, found = code_version(), look()
    if not watch:
        console.print(_live(found, current))
        return
    with Live(_live(found, current), console=console, auto_refresh=False) as live:
        try:
            while any(one.state not in (FINISHED, FAILED, *NEVER_RUN) for one in found):
                time.sleep(seconds)
                found = look()
                live.update(_live(found, current), refresh=True)
        except KeyboardInterrupt:
            return


def results(rows: list[dict[str, Any]], folder: Path) -> str:
    """The losses of the finished cells."""
    table = [["Cell", "parameters", "FLOPs", "loss"]]
    table += [
        [row["cell"], short_counts([row["params"]])[0], flops_text(row["total_flops"]),
         f"{row['final_eval_loss']:.4f}"]
        for row in rows
    ]  # fmt: skip
    return "\n".join([*aligned(table), "", f"{folder / 'results.json'}: {len(rows)} cells"])
