"""Making the report of a study: ``report.html``, pictures and ``report.json`` in its folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_progressive.compare.data_words import per_unit
from megatron_progressive.compare.figures import mixing_curve
from megatron_progressive.compare.gaps import MIXED_PERCENT
from megatron_progressive.compare.pilot import headline as pilot_headline
from megatron_progressive.compare.validated import validated
from megatron_progressive.grid.cells import PILOT
from megatron_progressive.grid.grid import Grid
from megatron_progressive.grid.labels import arm_words, is_control
from megatron_progressive.grid.report import crossing_figure, sweep_figures
from megatron_progressive.grid.report import figures as grid_figures
from megatron_progressive.grid.report import page as grid_page
from megatron_progressive.grid.report import verdict as grid_verdict
from megatron_progressive.grid.report.crossings import as_values, studies
from megatron_progressive.grid.report.judged import GridReport
from megatron_progressive.grid.report.laws import (
    Law,
    Prediction,
    Saving,
    compute_laws,
    frontier,
    predictions,
    savings,
    size_token_laws,
)
from megatron_progressive.grid.report.variants import ablation
from megatron_progressive.grid.report.verdict import Finding, comparisons, distinct, findings
from megatron_progressive.grid.results import Result, gather
from megatron_progressive.grid.state import Study
from megatron_progressive.runs.reading import read_run
from megatron_progressive.runtime.files import finite_values, write_atomically, write_json
from megatron_progressive.runtime.progress import Say


def make_grid_report(study: Study, say: Say = lambda text: None) -> GridReport:
    """Judge the finished cells of a study and write its report; ``results.json`` as well.

    Unfinished and failed cells are listed, and a law with too few cells is refused by what it
    lacks: a partial study gives a partial report.

    Args:
        say: told what is being done now.
    """
    study.collect()
    grid = study.grid
    results = gather(study)
    compared = comparisons(results, grid)
    found = findings(results, compared, say)
    laws = compute_laws(results, say)
    report = GridReport(
        title=grid_verdict.title(grid.name, found),
        grid=grid,
        results=results,
        findings=found,
        missing=[one for comparison in compared.values() for one in comparison.missing],
        laws=laws,
        size_token_laws=size_token_laws(results, say),
        predictions=predictions(results, say),
        savings=savings(results, laws),
        ablation=ablation(results),
        pilot=_pilot_text(grid, results, found),
        crossings=studies(grid, results, found),
    )
    styles, out = grid_figures.looks(results), grid.folder
    drawn: list[tuple[str, str, Callable[[str, Path], bool]]] = [
        ("laws", _laws_title(laws), lambda t, p: grid_figures.laws(results, laws, styles, t, p)),
        ("frontier", _frontier_title(results),
         lambda t, p: grid_figures.pareto(results, styles, t, p)),
        ("efficiency", _savings_title(report.savings),
         lambda t, p: grid_figures.efficiency(report.savings, styles, t, p)),
        ("mixing", _mixing_title(found),
         lambda t, p: sweep_figures.mixing(results, compared, styles, t, p)),
        ("tau", "Where to expand: final loss against τ",
         lambda t, p: sweep_figures.tau_sweep(results, t, p)),
        ("pilot", grid.name, lambda t, p: _pilot_picture(grid, p)),
        ("crossing", "; ".join(one.title for one in report.crossings),
         lambda t, p: crossing_figure.crossings(report.crossings, t, _per(results), p)),
    ]  # fmt: skip
    for name, title, draw in drawn:
        path = out / f"{name}.png"
        say(f"drawing {path.name}")
        if draw(title, path):
            report.pictures[name] = path
        else:  # one of before would be of other cells
            path.unlink(missing_ok=True)
    write_json(out / "report.json", as_json(report))
    write_atomically(out / "report.html", grid_page.render(report))
    return report


def _per(results: list[Result]) -> str:
    return per_unit(result.run.unit for result in results if result.run is not None)


def _laws_title(laws: list[Law]) -> str:
    known = [law for law in laws if law.fit is not None]
    if not known:
        return "Loss against FLOPs; too few cells for a law"
    ends = []  # of the intervals of the exponents that are known: beyond them, no number
    for law in known:
        if law.fit is not None and "alpha" not in law.fit.undetermined:
            alpha = law.fit.parameters["alpha"]
            high = math.inf if alpha.high is None else alpha.high
            ends.append((alpha.low or 0.0, high, law.family))
    if not ends:
        return "Loss against FLOPs: the cells do not determine the exponents α of the laws"
    if len(known) > 1 == len(ends):
        return f"Loss against FLOPs: the cells determine the exponent α of {ends[0][2]} only"
    if len(known) == 1:
        return f"Loss against FLOPs: α of {ends[0][2]} from {ends[0][0]:.2g} to {ends[0][1]:.2g}"
    steep, flat = max(ends), min(ends, key=lambda end: end[1])
    if steep[0] <= flat[1]:
        return "Loss against FLOPs: the exponents α of the laws cannot be told apart"
    return f"Loss against FLOPs: the law of {steep[2]} falls more steeply than that of {flat[2]}"


def _frontier_title(results: list[Result]) -> str:
    best = frontier(results)
    counts: dict[str, int] = {}
    for result in best:
        arm = arm_words(result.cell.arm)
        counts[arm] = counts.get(arm, 0) + 1
    listed = ", ".join(f"{count} {arm}" for arm, count in counts.items())
    return f"On the frontier of loss and FLOPs: {listed}"


def _savings_title(found: list[Saving]) -> str:
    largest = max((s.params for s in found), default=0)
    known: list[str] = []
    unsure: list[str] = []
    for saving in found:
        if saving.params != largest or is_control(saving.reference) or not saving.efficiency:
            continue
        factor = saving.efficiency.factor
        if not factor.value:
            continue
        text = grid_figures.factor_text(factor.value)
        told = (factor.low or 0.0) > 1 or (factor.high is not None and factor.high < 1)
        (known if told else unsure).append(f"{text} the FLOPs of {saving.family}")
    if known:
        return f"At equal loss and the largest size fixed-size needs {' and '.join(known)}"
    if unsure:
        return (
            f"At equal loss and the largest size what fixed-size needs is open: "
            f"{' and '.join(unsure)}, with intervals on both sides of 1"
        )
    return "At the largest size no law of a run that grows comes down to fixed-size's loss"


def _mixing_title(found: list[Finding]) -> str:
    measured = [mixed for one in distinct(found) for mixed in one.mixed]
    if not measured:
        return "The gap to fixed-size after τ; too few validations to tell whether runs mixed"
    return f"{sum(measured)} of {len(measured)} runs mixed with fixed-size after τ"


def _pilot_text(grid: Grid, results: list[Result], found: list[Finding]) -> str:
    if grid.pilot is None:
        return ""
    finding = grid.pilot.finding()
    if not finding:
        return "it has not run yet"
    names = {result.cell.folder.name for result in results if result.cell.tau == PILOT}
    own = distinct(found)
    verdicts = (verdict for one in own for verdict in one.verdicts if verdict.run in names)
    gaps = [v.loss_gap_percent for v in verdicts if v.loss_gap_percent is not None]
    if not gaps:
        return finding
    met = sum(gap <= MIXED_PERCENT for gap in gaps)
    return (
        f"{finding}; runs with τ from it that ended within {MIXED_PERCENT} % of fixed-size: "
        f"{met} of {len(gaps)}"
    )


def _pilot_picture(grid: Grid, path: Path) -> bool:
    mixing = None if grid.pilot is None else grid.pilot.mixing()
    if grid.pilot is None or mixing is None:
        return False
    arms = (grid.pilot.plan.progressive, grid.pilot.plan.fixed)
    if not all((arm.folder / "metrics.jsonl").is_file() for arm in arms):
        return False  # the result is kept when its runs are deleted
    progressive, fixed = (read_run(arm.folder) for arm in arms)
    mixing_curve(mixing, progressive, fixed, f"Pilot: {pilot_headline(mixing)}", path)
    return True


def as_json(report: GridReport) -> dict[str, Any]:
    """The report as plain values; null where a number is not finite. Bootstrap samples are left
    out, since a law's seed and its cells give them again."""
    values = {
        "title": report.title,
        "complete": report.complete,
        "grid": str(report.grid.file),
        "versions": report.versions,
        "pilot": report.pilot,
        "crossings": [as_values(one) for one in report.crossings],
        "findings": [asdict(one) for one in report.findings],
        "missing": [asdict(one) for one in report.missing],
        "laws": [_law(law) for law in report.laws],
        "size_token_laws": [_law(law) for law in report.size_token_laws],
        "predictions": [_prediction(one) for one in report.predictions],
        "savings": [asdict(one) for one in report.savings],
        "frontier": [result.cell.name for result in frontier(report.results)],
        "ablation": report.ablation,
        "cells": [_cell(result) for result in report.results],
        "pictures": [path.name for path in report.pictures.values()],
    }
    plain: dict[str, Any] = finite_values(values)
    return plain


def _law(law: Law) -> dict[str, Any]:
    values = asdict(law)
    if values["fit"] is not None:
        del values["fit"]["draws"]
    return values


def _prediction(one: Prediction) -> dict[str, Any]:
    found = one.rollout
    derived = (
        {} if found is None else {"error_percent": found.error_percent, "inside": found.inside}
    )
    return {**asdict(one), **derived}


def _cell(result: Result) -> dict[str, Any]:
    status, run = result.status, result.run
    return {
        "cell": result.cell.name,
        "family": result.family,
        "size": result.cell.size,
        "arm": result.cell.arm,
        "seed": result.cell.seed,
        "state": status.state,
        "fingerprint": result.cell.fingerprint,
        "params": result.params,
        "expansion_steps": [] if result.cell.unknown else result.cell.config.expansion_steps(),
        "steps_done": status.step,
        "planned_flops": result.cell.flops,
        "total_flops": result.flops,
        "final_eval_loss": result.loss,
        "validation": {} if run is None else validated(run),
        "train_wall_s": None if run is None else run.train_wall,
        "failures": status.attempts.failures,
        "version": status.attempts.version,
        "why": status.why or result.problem,
        "warnings": [] if run is None else run.warnings,
    }
