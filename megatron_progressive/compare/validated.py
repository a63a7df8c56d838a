"""The validation sets of runs, and the parts of their mixtures, as reports show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_progressive.data import HELD_OUT, MANY_EPOCHS, part_draws, tokens_of
from megatron_progressive.runs.reading import Curve, Run

Validated = dict[str, dict[str, float]]
"""The ``loss`` and, where it is known, the ``bits_per_byte`` of each validation set by name."""

HEADER = ("run", "validation set", "loss", "bits per byte")


def validated(run: Run) -> Validated:
    """What the last validation of a run found on each of its sets."""
    curves = {HELD_OUT: run.evals, **run.sets}
    return {name: found for name, curve in curves.items() if (found := _last(curve))}


def _last(curve: Curve) -> dict[str, float]:
    if not len(curve):
        return {}
    last = {name: float(curve[name][-1]) for name in ("loss", "bits_per_byte")}
    return {name: value for name, value in last.items() if math.isfinite(value)}


def validation_rows(found: Mapping[str, Validated]) -> list[list[str]]:
    """The rows of a table below :data:`HEADER`, of runs by name. None where they say no more than
    the loss on held-out text."""
    return [
        [name, "held-out text" if one == HELD_OUT else one, _text(numbers.get("loss")),
         _text(numbers.get("bits_per_byte"))]
        for name, sets in found.items()
        for one, numbers in sets.items()
        if len(sets) > 1 or "bits_per_byte" in numbers
    ]  # fmt: skip


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def validation_lines(found: Mapping[str, Validated]) -> list[str]:
    """One line for each run with further validation sets."""
    return [
        f"{name}: "
        + "; ".join(
            f"{'held-out text' if one == HELD_OUT else one} {_text(numbers.get('loss'))}"
            + (f" ({bits:.4f} bits per byte)" if (bits := numbers.get("bits_per_byte")) else "")
            for one, numbers in sets.items()
        )
        for name, sets in found.items()
        if len(sets) > 1
    ]


def data_notes(runs: Sequence[Run]) -> list[str]:
    """What each run on a mixture has drawn of its parts so far, in tokens and epochs."""
    notes = []
    for run in runs:
        if not run.config.data.mix:
            continue
        known = [] if run.trained_on is None else tokens_of(run.trained_on)
        tokens = known or [None] * len(run.config.data.mix)
        draws = part_draws(run.config, tokens, run.last_step * run.config.train.global_batch)
        many = [one.corpus for one in draws if one.epochs is not None and one.epochs > MANY_EPOCHS]
        warning = f" (more than {MANY_EPOCHS:g} epochs of {', '.join(many)})" if many else ""
        notes.append(f"{run.name} has drawn {'; '.join(one.words() for one in draws)}{warning}")
    return notes
