"""The report of a set of runs: ``report.json``, pictures and one self-contained page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_progressive.compare import figures, page
from megatron_progressive.compare.arms import Comparison, arm_of, compare
from megatron_progressive.compare.judged import Report
from megatron_progressive.compare.rows import HEADER, make_row, table_cells
from megatron_progressive.compare.validated import data_notes, validation_lines
from megatron_progressive.compare.verdict import recipes, verdicts
from megatron_progressive.compare.verdict_words import mixing_title, report_title
from megatron_progressive.config import ConfigError
from megatron_progressive.evaluation.results import task_rows
from megatron_progressive.runs.files import SUMMARY_FILE, read_summary
from megatron_progressive.runs.reading import Run, read_run
from megatron_progressive.runtime.files import finite_values, write_atomically, write_json
from megatron_progressive.runtime.folder_lock import LOCK_NAME, owner_of
from megatron_progressive.runtime.text import flops_text

_PAGE_ONLY = ("params", "tokens")  # columns that 80 characters have no room for
VERDICT_KEYS = ("speedup_flops", "speedup_wall", "loss_gap_percent", "verdict")


def make_report(run_folders: Sequence[Path], out: Path) -> Report:
    """Compare the runs of ``run_folders`` and write the report into ``out`` (created).

    Writes ``report.html`` (nothing outside it is needed), ``report.json``, ``overview.png`` and,
    where a fixed-size run is there, ``gap.png``.

    Raises:
        ConfigError: there are no folders, a folder is no run, or metrics cannot be read.
    """
    if not run_folders:
        raise ConfigError("RUN: got none; accepted: one run folder or more")
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in run_folders))
    runs = [read_run(folder) for folder in folders]
    report, comparisons = _judge(runs)
    out.mkdir(parents=True, exist_ok=True)
    lines = figures.lines_of([(run, row.arm) for run, row in zip(runs, report.rows, strict=True)])
    pictures = [out / "overview.png"]
    figures.overview(lines, report.title, pictures[0])
    mixings = [one.mixing for one in report.verdicts if one.mixing is not None]
    if figures.gaps(comparisons, lines, mixing_title(mixings), out / "gap.png"):
        pictures.append(out / "gap.png")
    report.files.extend([out / "report.html", out / "report.json", *pictures])
    write_atomically(out / "report.html", page.render(report, pictures))
    write_json(out / "report.json", as_json(report))
    return report


def _judge(runs: Sequence[Run]) -> tuple[Report, list[Comparison]]:
    comparisons = compare(runs)
    found = verdicts(comparisons)
    rows = [make_row(run, arm_of(run, comparisons), comparisons) for run in runs]
    notes = [note for comparison in comparisons for note in comparison.notes]
    if not comparisons:
        notes.append("No progressive run among these: nothing to judge.")
    each = [one.controls for one in recipes(found, runs)]
    title = report_title(len(runs), [one.headline for one in found], each)
    return (
        Report(
            title=title,
            complete=bool(found) and all(verdict.complete for verdict in found),
            rows=rows,
            verdicts=found,
            missing=[missing for comparison in comparisons for missing in comparison.missing],
            tasks=[row for run in runs for row in task_rows(run.name, run.folder)],
            notes=list(
                dict.fromkeys(
                    [*notes, *data_notes(runs), *_data_notes(comparisons), *_flops_notes(runs)]
                )
            ),
        ),
        comparisons,
    )


def _data_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Notes where it is not known what the compared runs were trained on."""
    compared = [
        run for one in comparisons if one.controls for run in (one.progressive, *one.controls)
    ]
    unknown = dict.fromkeys(run.name for run in compared if run.trained_on is None)
    if not unknown:
        return []
    return [
        f"What {', '.join(unknown)} had for data was not recorded: their corpora are compared by "
        "name alone"
    ]


def _flops_notes(runs: Sequence[Run]) -> list[str]:
    """Notes where a run recorded other FLOPs than its configuration counts to."""
    notes = []
    for run in runs:
        recorded = run.total_flops
        if recorded is not None and abs(recorded / run.planned_flops - 1) > 0.001:
            notes.append(
                f"{run.name} recorded {flops_text(recorded)} FLOPs, its configuration counts to "
                f"{flops_text(run.planned_flops)}: another version of the code ran it"
            )
    return notes


def record_verdicts(report: Report) -> None:
    """Add the verdict of each finished progressive run to the run's own ``summary.json``. Where
    that may not be written, standard error says so; where a job trains on in the folder, it is left
    alone."""
    finished = {row.folder for row in report.rows if row.finished}
    finished = {folder for folder in finished if owner_of(Path(folder) / LOCK_NAME) is None}
    for verdict in report.verdicts:
        folder = Path(verdict.folder)
        path, (values, _) = folder / SUMMARY_FILE, read_summary(folder)
        if values is None or verdict.folder not in finished:
            continue
        try:
            write_json(path, {**values, **verdict_fields(report, folder)})
        except PermissionError:  # somebody else's run, compared with one's own
            print(f"note: {path} is not written to: Permission denied", file=sys.stderr)


def verdict_fields(report: Report, folder: Path) -> dict[str, Any]:
    """The speed-ups, the loss gap and the verdict of the progressive run in ``folder``, as its
    ``summary.json`` has them, as far as they have a value. Empty for a run without a verdict."""
    for verdict in report.verdicts:
        if verdict.folder == str(folder.resolve()):
            values = {key: getattr(verdict, key) for key in VERDICT_KEYS}
            return {key: value for key, value in values.items() if value is not None}
    return {}


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values, with the first verdict's fields beside everything else, and null
    where a number is not finite."""
    first = report.verdicts[0] if report.verdicts else None
    values = {
        "title": report.title,
        "complete": report.complete,
        **{key: getattr(first, key, None) for key in VERDICT_KEYS},
        "verdicts": [asdict(verdict) for verdict in report.verdicts],
        "runs": [asdict(row) for row in report.rows],
        "tasks": [asdict(task) for task in report.tasks],
        "missing": [asdict(missing) for missing in report.missing],
        "notes": report.notes,
        "files": [path.name for path in report.files],
    }
    plain: dict[str, Any] = finite_values(values)
    return plain


def terminal_table(report: Report, console: Console | None = None) -> None:
    """Print the runs as a table made for 80 columns, then verdicts, what is missing, the warnings
    of the runs, notes and files."""
    console = console if console is not None else Console()
    console.print(_table(report))
    for line in validation_lines({row.name: row.validation for row in report.rows}):
        console.print(line, markup=False, highlight=False)
    for verdict in report.verdicts:
        console.print(f"{verdict.run}: {verdict.verdict}", markup=False, highlight=False)
    for missing in report.missing:
        console.print(f"{missing.run}: no {missing.words}; make it with", markup=False)
        # unwrapped: to be copied
        console.print(f"  {missing.command}", markup=False, highlight=False, soft_wrap=True)
    for row in report.rows:
        for warning in row.warnings:
            console.print(f"warning: {row.name}: {warning}", markup=False, highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    if report.files:
        console.print(str(report.files[0]), markup=False, highlight=False, soft_wrap=True)


def _table(report: Report) -> Table:
    table = Table(
        title=Text(report.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    shown = [index for index, name in enumerate(HEADER) if name not in _PAGE_ONLY]
    for index in shown:
        # names of runs may be long: theirs is the column that gives way
        table.add_column(
            HEADER[index],
            justify="left" if index < 2 else "right",
            no_wrap=HEADER[index] != "run",
            overflow="fold",
        )
    for row in report.rows:
        cells = table_cells(row)
        table.add_row(*(Text(cells[index]) for index in shown))
    return table
