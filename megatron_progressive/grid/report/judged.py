"""What the report of a study found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_progressive.compare.arms import Missing
from megatron_progressive.grid.grid import Grid
from megatron_progressive.grid.report.crossings import Study as Crossings
from megatron_progressive.grid.report.law_words import prediction_lines, saving_lines
from megatron_progressive.grid.report.laws import Law, Prediction, Saving
from megatron_progressive.grid.report.verdict import NOT_IN_THE_GRID, Finding
from megatron_progressive.grid.results import Result
from megatron_progressive.grid.state import FINISHED


@dataclass(frozen=True)
class GridReport:
    """The content of ``report.json``, which the page shows."""

    title: str
    grid: Grid
    results: list[Result]
    findings: list[Finding]
    missing: list[Missing]
    """Controls that finished runs which grow lack."""
    laws: list[Law]
    """The laws over FLOPs."""
    size_token_laws: list[Law]
    predictions: list[Prediction]
    """The largest size of each family, predicted from the smaller ones."""
    savings: list[Saving]
    ablation: tuple[list[str], list[list[str]]] | None
    pilot: str
    """What the pilot found, and whether it came true; empty without a pilot."""
    crossings: list[Crossings] = field(default_factory=list)
    """Where depths cross, in a crossing study."""
    pictures: dict[str, Path] = field(default_factory=dict)
    """The pictures, by what they show; a picture for which there is too little data is left out."""

    @property
    def complete(self) -> bool:
        return all(r.status.state == FINISHED and not r.problem for r in self.results)

    @property
    def versions(self) -> dict[str, int]:
        """The number of cells that each version of the code finished."""
        found: dict[str, int] = {}
        for result in self.results:
            if result.status.state == FINISHED:
                version = result.status.attempts.version or "unknown"
                found[version] = found.get(version, 0) + 1
        return found

    @property
    def text(self) -> str:
        """The report for the terminal: the answer, the findings by size, and where the page is."""
        lines = [self.title, ""]
        lines += [f"  {one.size}, {one.family}: {one.sentence}" for one in self.findings]
        absent = [one for one in self.missing if one.reason == NOT_IN_THE_GRID]
        for command in dict.fromkeys(one.command for one in absent):
            arms = " and no ".join(dict.fromkeys(o.arm for o in absent if o.command == command))
            lines.append(f"  the grid has no {arms} run, without which nothing pays: {command}")
        lines += [f"  {line}" for line in refusals(self.laws)]
        known = {law.family for law in self.laws if law.fit is not None}
        told = [one for one in self.predictions if one.family in known]  # others are refused above
        lines += [f"  {line}" for line in prediction_lines(told)]
        lines += [f"  {line}" for line in saving_lines(self.savings)]
        for crossing in self.crossings:
            lines += [f"  {crossing.title}", *(f"    {text}" for text in crossing.sentences)]
        if self.pilot:
            lines.append(f"  pilot: {self.pilot}")
        if not self.complete:
            lines.append(f"  {partial(self)}")
        return "\n".join([*lines, str(self.grid.folder / "report.html")])


def partial(report: GridReport) -> str:
    """How much of the grid the report covers."""
    states = [result.status.state for result in report.results]
    counts = ", ".join(
        f"{states.count(state)} {state}" for state in dict.fromkeys(states) if state != FINISHED
    )
    return (
        f"{states.count(FINISHED)} of {len(states)} cells are finished ({counts}); the others are "
        f"listed below and count nowhere."
    )


def refusals(laws: list[Law]) -> list[str]:
    """Why there are no laws, one line for each reason."""
    reasons: dict[str, list[str]] = {}
    for law in laws:
        if law.fit is None:
            reasons.setdefault(law.refused, []).append(law.family)
    whole = f"any of the {len(laws)} kinds of run"
    return [
        f"No law of {whole if len(found) == len(laws) > 1 else ', '.join(found)}: {reason}."
        for reason, found in reasons.items()
    ]
