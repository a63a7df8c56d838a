"""The report as one HTML page that needs nothing outside itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_progressive.compare.data_words import counted, per_unit
from megatron_progressive.compare.rows import header, table_cells
from megatron_progressive.compare.validated import HEADER, Validated, validation_rows

if TYPE_CHECKING:
    from megatron_progressive.compare.judged import Report

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.3; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
pre { background: #f3f3f3; padding: .8rem; overflow-x: auto; font-size: .8rem; }
h3 { font-size: 1rem; margin-top: 1.4rem; } summary { cursor: pointer; }
td:first-child { white-space: normal; overflow-wrap: anywhere; }
code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }
.missing { border-left: 4px solid #D55E00; padding-left: 1rem; }
"""


def render(report: Report, pictures: Sequence[Path]) -> str:
    """The page: the finding, verdicts, pictures, the table, and what is missing or was noted."""
    parts = [f"<h1>{escape(report.title)}</h1>"]
    if report.missing:
        parts.append(_missing(report))
    for verdict in report.verdicts:
        parts.append(f"<h2>{escape(verdict.run)}, seed {verdict.seed}</h2>")
        parts.append(items(verdict.sentences))
    parts += [picture(path) for path in pictures]
    parts += [
        "<h2>Runs</h2>",
        table(header(report.rows), [table_cells(row) for row in report.rows]),
        validation_table({row.name: row.validation for row in report.rows}),
        _expansions(report),
        _tasks(report),
    ]
    warnings = [f"{row.name}: {text}" for row in report.rows for text in row.warnings]
    for title, texts in (("Warnings of the runs", warnings), ("Notes", report.notes)):
        if texts:
            parts += [f"<h2>{title}</h2>", items(texts)]
    units = [row.unit for row in report.rows]
    parts.append(
        f"<p>{counted(units)} The FLOPs speed-up is the fixed-size run's total over the "
        "progressive run's, to be read beside the loss gap. Losses are in nats per "
        f"{per_unit(units)}. Training time is of the steps and expansion pauses, and compares only "
        "between runs on the same machines.</p>"
    )
    return document(report.title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A page of its own, made of ``parts``, which are HTML; empty parts are left out."""
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def items(texts: Sequence[str]) -> str:
    """A list of plain texts as HTML; empty where there are none."""
    if not texts:
        return ""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def _missing(report: Report) -> str:
    items = []
    for missing in report.missing:
        text = f"{missing.run}: no {missing.words} ({missing.reason})."
        command = f"<code>{escape(missing.command)}</code>"
        items.append(f"<li>{escape(text)} Make it: {command}</li>")
    return f'<div class="missing"><strong>Incomplete.</strong><ul>{"".join(items)}</ul></div>'


def picture(path: Path) -> str:
    """A PNG as a part of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts, whose first two columns are aligned to the left."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows
    ]
    return f'<div class="scroll"><table><tr>{top}</tr>{"".join(body)}</table></div>'


def validation_table(found: Mapping[str, Validated]) -> str:
    """The last validation of runs, by name, as a section; empty where there is no more to say than
    the loss on held-out text."""
    rows = validation_rows(found)
    if not rows:
        return ""
    return (
        "<h2>Validation</h2><p>Loss in nats per token; bits per byte do not depend on the "
        "tokenizer: nats of all tokens over ln 2 and the bytes of text that they stand for.</p>"
        + table(HEADER, rows)
    )


def _expansions(report: Report) -> str:
    texts = []
    for row in report.rows:
        for event in row.expansions:
            texts.append(
                f"{row.name}: after step {event.get('step')} from {event.get('from_layers')} to "
                f"{event.get('to_layers')} layers, init {event.get('init')}, optimizer state "
                f"{event.get('state_policy')}, {event.get('layout_before')} to "
                f"{event.get('layout_after')}, {_value(event.get('seconds'))} s pause; validation "
                f"loss {_value(event.get('loss_before'))} to {_value(event.get('loss_after'))}"
            )
    return "<h2>Expansions</h2>" + items(texts) if texts else ""


def _tasks(report: Report) -> str:
    """The scores on downstream tasks, of which a run's newest checkpoint comes last."""
    if not report.tasks:
        return ""
    head = ["task", "run", "settings", "metric", "step", "layers", "value", "standard error"]
    cells = [
        [
            row.task, row.run, row.settings, row.metric, f"{row.step:,}",
            "–" if row.num_layers is None else str(row.num_layers), f"{row.value:.4f}",
            "–" if row.stderr is None else f"{row.stderr:.4f}",
        ]
        for row in sorted(report.tasks, key=lambda row: (row.task, row.metric, row.settings))
    ]  # fmt: skip
    return "<h2>Downstream tasks</h2>" + table(head, cells)


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "?"
