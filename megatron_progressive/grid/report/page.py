"""The report of a study as one HTML page that needs nothing outside itself, for a reader who was
not there."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from megatron_progressive.compare.data_words import counted, data_text, held_out, per_unit
from megatron_progressive.compare.decision import BELOW, NOT_BELOW, POWER
from megatron_progressive.compare.gaps import MIXED_PERCENT
from megatron_progressive.compare.page import (
    document,
    items,
    picture,
    table,
    validation_table,
)
from megatron_progressive.compare.validated import validated
from megatron_progressive.compare.verdict_words import gap_text, needed_text
from megatron_progressive.cost.flops import step_tokens
from megatron_progressive.grid.cells import ONE_LAYER, ZERO_LAYER
from megatron_progressive.grid.labels import arm_meaning, arm_words
from megatron_progressive.grid.report import crossings
from megatron_progressive.grid.report.judged import partial, refusals
from megatron_progressive.grid.report.law_words import (
    between_text,
    error_text,
    inside_text,
    law_text,
    number_text,
    prediction_lines,
)
from megatron_progressive.grid.report.laws import Law
from megatron_progressive.grid.results import Result, sizes_of
from megatron_progressive.grid.state import FINISHED
from megatron_progressive.laws.fits import LEVEL, Fit, Interval
from megatron_progressive.models import model_shape
from megatron_progressive.models.description import size_columns
from megatron_progressive.runtime.text import flops_text, short_counts, time_text

if TYPE_CHECKING:
    from megatron_progressive.grid.report.judged import GridReport

_SHOWN = 12  # sentences that a reader may want to read before the figures


def render(report: GridReport) -> str:
    """The page: the answer, what was run, laws, savings, mixing, sweeps, and every cell."""
    parts = [f"<h1>{escape(report.title)}</h1>"]
    if not report.complete:
        parts.append(
            f'<div class="missing"><strong>Partial.</strong> {escape(partial(report))}</div>'
        )
    parts += [_missing(report), _answer(report)]
    parts += [crossings.section(report.crossings, report.pictures.get("crossing"))]
    parts += [_what_was_run(report), _pilot(report)]
    parts += [_laws(report), _savings(report)]
    parts += [_figure(report, "mixing", "After the expansion", _no_mixing(report))]
    parts += [_figure(report, "tau", "Where to expand", ""), _ablation(report)]
    sets = {one.cell.name: validated(one.run) for one in report.results if one.run is not None}
    parts += [_cells(report), validation_table(sets), _problems(report), _reading(report)]
    return document(report.title, parts)


def _answer(report: GridReport) -> str:
    if not report.findings:
        return "<h2>Does growing pay?</h2><p>No run that grows is finished.</p>"
    controls = [control.control for control in report.findings[0].controls]
    head = ["size", "run that grows", "parameters", "pays?", "FLOPs of fixed-size",
            "loss to fixed-size", f"within {MIXED_PERCENT} %?"]  # fmt: skip
    for control in controls:
        head += [f"loss to {control}", "below?", "pairs needed"]
    head += ["mixed", "seeds"]
    rows = []
    for one in report.findings:
        row = [
            one.size, one.family, short_counts([one.params])[0], one.outcome,
            "–" if one.flops_share is None else f"{100 * one.flops_share:.0f} %",
            gap_text(one.to_fixed), _yes(one.to_fixed.outcome),
        ]  # fmt: skip
        for against in one.controls:
            row += [gap_text(against), _yes(against.outcome), needed_text(against)]
        row += [
            f"{sum(one.mixed)} of {len(one.mixed)}" if one.mixed else "–",
            ", ".join(map(str, one.seeds)),
        ]
        rows.append(row)
    sentences = [f"{one.size}, {one.family}: {one.sentence}." for one in report.findings]
    shown = items(sentences)
    if len(sentences) > _SHOWN:
        shown = f"<details><summary>Each line in words</summary>{shown}</details>"
    details = [
        f"<p>{escape(verdict.run)}, seed {verdict.seed}</p>{items(verdict.sentences)}"
        for one in report.findings
        for verdict in one.verdicts
    ]
    return (
        f"<h2>Does growing pay?</h2>{table(head, rows)}"
        f"<p>Losses are final validation losses; a minus is in favour of growing. A run pays "
        f"where it ends below {' and '.join(controls)}, each of the same FLOPs; it does not where "
        "it does not end below one of them, and without one of them nothing pays. Of a source "
        "with several depths the best counts. What is "
        "compared are pairs of runs with one seed, and so one order of data. Over several pairs "
        f"the mean difference is given with its {100 * LEVEL:.0f} % interval (Student's t), which "
        "decides: what it leaves undecided is open, and so is everything with one pair, for two "
        "seeds of one recipe differ as well. Pairs needed: with so many a difference of this size, "
        f"at the spread that was seen, would be found with {100 * POWER:.0f} % power. Within "
        f"{MIXED_PERCENT} %: for fewer FLOPs than fixed-size. Whether a run mixed is not told "
        "(–) where too few validations follow τ.</p>"
        f"{shown}<details><summary>Each run in full sentences</summary>"
        f"{''.join(details)}</details>"
    )


def _yes(outcome: str) -> str:
    return {BELOW: "yes", NOT_BELOW: "no"}.get(outcome, outcome)


def _missing(report: GridReport) -> str:
    """Controls that runs which grow lack, by the command that makes them."""
    lacking: dict[str, list[str]] = {}
    for one in report.missing:
        lacking.setdefault(one.command, []).append(f"{one.run}: no {one.words} ({one.reason})")
    if not lacking:
        return ""
    shown = "".join(
        f"<li>{'; '.join(map(escape, texts))}. Make it: <code>{escape(command)}</code></li>"
        for command, texts in lacking.items()
    )
    return (
        '<div class="missing"><strong>Controls are missing</strong>: without them nothing is said '
        f"to pay.<details><summary>Which, and what makes them</summary><ul>{shown}</ul></details>"
        "</div>"
    )


def _what_was_run(report: GridReport) -> str:
    grid, results = report.grid, report.results
    config = results[0].cell.config
    seeds = sorted({result.cell.seed for result in results})
    schedules = list(dict.fromkeys(r.cell.config.schedule.name for r in results))
    arms = [
        f"{arm_words(arm)}: {arm_meaning(arm)}"
        for arm in dict.fromkeys(r.cell.arm for r in results)
    ]
    versions = ", ".join(f"{version}: {count} cells" for version, count in report.versions.items())
    warn = " Cells of several versions are compared here." if len(report.versions) > 1 else ""
    optim = config.optim
    facts = [
        f"Grid {grid.name} ({grid.file}), {len(results)} cells, seeds "
        f"{', '.join(map(str, seeds))}.",
        f"Model family {config.model.family}. Data: {data_text(config)}.",
        f"Optimizer {optim.name}, peak learning rate {optim.lr:g}, weight decay "
        f"{optim.weight_decay:g}; schedule {' and '.join(schedules)}, warmup "
        f"{100 * config.schedule.warmup:g} %"
        + (f", decay {100 * config.schedule.decay:g} %" if "wsd" in schedules else "")
        + f"; precision {config.train.precision}.",
        f"Code: {versions or 'no finished cell'}.{warn}",
    ]
    return (
        f"<h2>What was run</h2>{items(facts)}{_sizes(results)}<h3>Arms</h3>{items(arms)}"
        f"<details><summary>The grid file</summary><pre>{escape(grid.file.read_text())}</pre>"
        "</details>"
    )


def _sizes(results: list[Result]) -> str:
    head: list[str] = []
    rows = []
    for size, params in sizes_of(results).items():
        mine = [r for r in results if r.cell.size == size]
        longest = max(mine, key=lambda r: r.cell.config.train.steps).cell.config
        layers = max(mine, key=lambda r: r.params).cell.config  # of the full depth
        depth = layers.expansion[-1].to_layers if layers.expansion else layers.model.num_layers
        shape = model_shape(layers, depth)
        tokens = longest.train.steps * step_tokens(shape, longest)
        columns = {
            "size": size,
            "parameters": short_counts([params])[0],
            **size_columns(shape),
            "steps": f"{longest.train.steps:,}",
            shape.unit: short_counts([tokens])[0],
            "per parameter": f"{tokens / params:.0f}",
        }
        head = list(columns)
        rows.append(list(columns.values()))
    return table(head, rows)


def _pilot(report: GridReport) -> str:
    if not report.pilot or report.grid.pilot is None:
        return ""
    (tau,) = report.grid.pilot.plan.progressive.expansion_steps()
    parts = [f"<h2>Pilot</h2><p>{escape(report.pilot)}.</p>"]
    if "pilot" in report.pictures:
        parts.append(picture(report.pictures["pilot"]))
    parts.append(
        "<p>Two short runs at one size measured it, under the schedule of the whole run: "
        f"fixed-size, and one that expands after step {tau:,}. The mixing time in "
        f"{_unit(report)} is carried over to every size and to a late τ, as the paper does; cells "
        "with τ = pilot expand that long before the decay. Where they end above fixed-size, it "
        "does not hold that late: try an earlier τ.</p>"
    )
    return "".join(parts)


def _figure(report: GridReport, name: str, title: str, without: str) -> str:
    if name in report.pictures:
        return f"<h2>{title}</h2>{picture(report.pictures[name])}"
    return f"<h2>{title}</h2><p>{escape(without)}</p>" if without else ""


def _no_mixing(report: GridReport) -> str:
    if report.grid.crossings:
        return ""  # they have none
    return "No run that grows has its fixed-size run yet: no gap to draw."


def _laws(report: GridReport) -> str:
    parts = [_figure(report, "laws", "Loss against compute", "No cell is finished.")]
    parts.append(_law_table(report.laws, ("E", "A", "alpha")))
    parts.append(items(refusals(report.laws)))
    unit = _unit(report)
    parts.append(f"<h3>Over parameters N and {unit} D: L = E + A / N^α + B / D^β</h3>")
    fitted = [law for law in report.size_token_laws if law.fit is not None]
    parts.append(_law_table(fitted, ("E", "alpha", "beta")))
    parts.append(items(refusals(report.size_token_laws)))
    parts.append(_predictions(report))
    parts.append(_figure(report, "frontier", "Pareto frontier", ""))
    return "".join(parts)


def _law_table(laws: list[Law], names: tuple[str, ...]) -> str:
    rows = []
    for law in laws:
        if law.fit is not None:
            found = [_parameter(law.fit, name) for name in names]
            residual = f"{100 * law.fit.rms_log_residual:.2f} %"
            rows.append([law.family, str(law.fit.cells), *found, residual])
    if not rows:
        return ""
    symbols = {"alpha": "α", "beta": "β"}
    head = ["run", "cells", *(symbols.get(name, name) for name in names), "residual"]
    notes = [f"{law.family}: {note}" for law in laws if law.fit for note in law.fit.notes]
    return table(head, rows) + (items(notes) if notes else "")


def _parameter(fit: Fit, name: str) -> str:
    """The text of a law's parameter. For a parameter that the cells do not determine it has no
    number, which a reader would take for a finding."""
    return "not determined" if name in fit.undetermined else _interval(fit.parameters[name])


def _interval(found: Interval) -> str:
    low, high = (_digits(value) for value in (found.low, found.high))
    return f"{_digits(found.value)} ({low} to {high})"


def _digits(value: float | None) -> str:
    return "open" if value is None else f"{value:.3g}"


def _predictions(report: GridReport) -> str:
    """The largest size from the smaller ones: the honest test of a law."""
    known = [one for one in report.predictions if one.rollout is not None]
    refused = [one for one in report.predictions if one.rollout is None]
    rows = [
        [one.family, one.size, str(one.rollout.cells), number_text(one.rollout.predicted.value),
         f"{number_text(one.rollout.predicted.low)} to {number_text(one.rollout.predicted.high)}",
         f"{one.rollout.measured:.4f}", error_text(one), inside_text(one)]
        for one in known
        if one.rollout is not None
    ]  # fmt: skip
    head = ("run", "largest size", "cells of smaller sizes", "predicted",
            f"{100 * LEVEL:.0f} %", "measured", "error", "measured is")  # fmt: skip
    return (
        "<h3>The largest size, predicted from the smaller ones</h3>"
        + (table(head, rows) if rows else "")
        + items(prediction_lines(refused))
        + "<p>The law over FLOPs is fitted without the largest size and asked for its loss. A law "
        "that fails here says nothing of sizes beyond. The interval is the law's own: one more run "
        "scatters around it.</p>"
    )


def _savings(report: GridReport) -> str:
    title = "Compute efficiency"
    if not report.savings:
        return _figure(
            report, "efficiency", title,
            "A factor at equal loss needs the laws of a run that grows and of its control, or "
            "cells of it at two numbers of FLOPs between which the control's loss lies.",
        )  # fmt: skip
    head = ("size", "run that grows", "against", "at loss", "FLOPs there", "by the laws (95 %)", "",
            "between cells, without a law")  # fmt: skip
    rows = []
    for saving in report.savings:
        found = saving.efficiency
        loss, compute = (None, None) if found is None else (found.loss, found.compute)
        rows.append(
            [saving.size, saving.family, saving.reference, "–" if found is None else _digits(loss),
             "–" if compute is None else flops_text(compute), law_text(saving),
             "extrapolated" if found is not None and found.extrapolated else "",
             between_text(saving.between)]
        )  # fmt: skip
    never = "<p>A factor of 0: its law does not come down to that loss.</p>"
    laws = [one.efficiency.factor.value for one in report.savings if one.efficiency is not None]
    return "".join(
        [
            _figure(report, "efficiency", title, ""),
            table(head, rows),
            never if 0 in laws else "",
            "<p>Without a law the loss is read off straight lines between an arm's cells (log "
            "FLOPs, log loss, seeds averaged), and has no interval. A factor by the laws far from "
            "it rests on the law.</p>",
        ]
    )


def _ablation(report: GridReport) -> str:
    if report.ablation is None:
        return ""
    head, rows = report.ablation
    return (
        "<h2>Variants of the expansion</h2>"
        f"{table(head, rows)}<p>Final validation loss, in brackets against fixed-size of the same "
        "schedule; seeds are averaged.</p>"
    )


def _cells(report: GridReport) -> str:
    head = ("cell", "state", "fingerprint", "parameters", "τ", "steps", "FLOPs", "loss", "time",
            "version")  # fmt: skip
    rows = []
    for result in report.results:
        cell, status, run = result.cell, result.status, result.run
        last = cell.config.last_step
        done = status.state == FINISHED
        wall = None if run is None else run.train_wall
        taus = "→".join(f"{step:,}" for step in cell.config.expansion_steps())
        rows.append(
            [cell.name, status.state, cell.fingerprint or "–", short_counts([result.params])[0],
             "?" if cell.unknown and taus else taus or "–",
             f"{last:,}" if done else f"{status.step:,}/{last:,}",
             flops_text(result.flops) if result.flops else f"({flops_text(cell.flops)})",
             "–" if result.loss is None else f"{result.loss:.4f}",
             "–" if wall is None else time_text(wall), status.attempts.version or "–"]
        )  # fmt: skip
    return (
        f"<h2>All cells</h2>{table(head, rows)}<p>FLOPs in brackets are planned. A fingerprint is "
        "of everything that decides a run's result: cells of one fingerprint are one run, which "
        "counts once.</p>"
    )


def _problems(report: GridReport) -> str:
    parts = []
    for title, texts in (
        ("Failed and not run", [f"{r.cell.name} (failures: {r.status.attempts.failures}): "
                                f"{r.status.why or r.problem}"
                                for r in report.results if r.status.why or r.problem]),
        ("Unfinished", [f"{r.cell.name}: {r.status.state}, step {r.status.step:,} of "
                        f"{r.cell.config.last_step:,}"
                        for r in report.results if r.status.state != FINISHED]),
        ("Warnings of the runs", [f"{r.cell.name}: {text}" for r in report.results
                                  if r.run is not None for text in r.run.warnings]),
    ):  # fmt: skip
        if texts:
            parts.append(f"<h2>{title}</h2>{items(texts)}")
    return "".join(parts)


def _unit(report: GridReport) -> str:
    """What samples are made of, ``tokens`` or ``images``; a grid has one family."""
    return model_shape(report.results[0].cell.config).unit


def _reading(report: GridReport) -> str:
    arms = {result.cell.arm for result in report.results}
    grown = " or ".join(arm_words(arm) for arm in (ZERO_LAYER, ONE_LAYER) if arm in arms)
    subject, unit = grown or "run that grows", _unit(report)
    return (
        "<h2>How to read this</h2>"
        f"<p>{counted([unit])} Losses are in nats per {per_unit([unit])}, {held_out(unit)}. Laws "
        "are fitted by Huber's loss of the log loss; "
        "intervals and bands are percentiles of a bootstrap of the cells' losses around the fit, "
        "and wide where cells are few. A law over sizes that all have the same data mixes more "
        f"parameters with fewer {unit} a parameter: it describes this grid, and no other budget. "
        f"The compute-efficiency factor is the FLOPs with which the reference has a loss over "
        f"those with which the {escape(subject)} run has it. Time is of training steps and "
        "expansion pauses, and compares only between cells on the same, equally busy machines."
        "</p>"
    )
