"""Comparisons of runs that grow with controls of equal FLOPs: a small table that comes with the
package, of published findings and our own, and the user's own finished studies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from megatron_progressive.compare.advise.regime import Growth, Regime
from megatron_progressive.compare.arms import EQUAL_FLOPS
from megatron_progressive.compare.decision import Against, against, overall
from megatron_progressive.config import ConfigError
from megatron_progressive.config.values import shown

TABLE = "known.yaml"
REPORT = "report.json"


@dataclass(frozen=True)
class Evidence:
    """One run that grows, or one recipe over seeds, against its controls."""

    name: str
    """What was trained, in a few words."""
    source: str
    """Where it is told: an arXiv number, an issue, a page of ours, or the folder of a study."""
    regime: Regime
    controls: list[Against]
    """The differences to the controls of equal FLOPs; one without a mean was not run."""
    flops_share: float | None
    """Its FLOPs over those of fixed-size training; None where the source does not say."""
    note: str = ""
    """What the numbers do not say."""

    @property
    def outcome(self) -> str:
        """Whether growing pays there (:func:`.decision.overall`)."""
        return overall(self.controls)

    @property
    def measured(self) -> bool:
        """Whether any control of equal FLOPs was run."""
        return any(one.mean is not None for one in self.controls)


def shipped() -> list[Evidence]:
    """The table that comes with the package."""
    text = resources.files(__package__).joinpath(TABLE).read_text(encoding="utf-8")
    return [_row(values) for values in yaml.safe_load(text)]


def _row(values: dict[str, Any]) -> Evidence:
    """One row of the table; the differences are in %, one for each pair of runs of one seed."""
    names = [control.name for control in EQUAL_FLOPS]
    short, never = names
    lacking = {short: values.get("short_lacks", []), never: values.get("never_lacks", [])}
    pairs = {short: values.get("short", []), never: values.get("never", [])}
    growth, tokens = None, values["tokens_per_param"]
    if "depths" in values:
        placing = values.get("init", "copying"), values.get("insert", "bottom")
        growth = Growth(values["depths"], values["tau"], *placing)
    regime = Regime(
        values["family"], values.get("experts", False), values.get("width"),
        float(values["params"]), None if tokens is None else float(tokens),
        values["optimizer"], values["schedule"], growth,
    )  # fmt: skip
    controls = [
        against(name, list(enumerate(map(float, pairs[name]), 1)), lacking=lacking[name])
        for name in names
    ]
    return Evidence(
        values["name"], values["source"], regime, controls, values.get("flops_share"),
        values.get("note", ""),
    )  # fmt: skip


def of_study(folder: Path) -> list[Evidence]:
    """What a finished study found, from the ``report.json`` that ``mprog grid report`` writes.

    Args:
        folder: the study's folder, which is ``study.dir/study.name`` of its grid.

    Raises:
        ConfigError: there is no such report, or it cannot be read.
    """
    file = folder / REPORT
    accepted = "accepted: the folder of a study, after mprog grid report"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"--studies: got {shown(str(folder))}, where no {REPORT} is; {accepted}"
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not JSON"
        raise ConfigError(
            f"--studies: got {shown(str(folder))}, whose {REPORT} cannot be read ({why}); "
            f"{accepted}"
        ) from None
    try:
        return [_finding(folder, one) for one in values["findings"]]
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"--studies: got {shown(str(folder))}, whose {REPORT} is of another version or of no "
            f"study; {accepted} of this version"
        ) from None


def _finding(folder: Path, values: dict[str, Any]) -> Evidence:
    found = dict(values["regime"])
    growth = Growth(**found.pop("growth"))
    controls = [Against(**one) for one in values["controls"]]
    name = f"{values['size']}, {values['family']}"
    return Evidence(
        name, str(folder), Regime(**found, growth=growth), controls, values["flops_share"]
    )
