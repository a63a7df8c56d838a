"""The fingerprint of a cell: what decides a run's result, in twelve digits.

Cells with one fingerprint are one run. The fingerprint ends the name of a cell's run folder, so
that two studies with the same run find it finished, and a run that differs in anything has a folder
of its own.
"""

from __future__ import annotations

import hashlib
import json

from megatron_progressive.config import RunConfig
from megatron_progressive.data import DataIdentity
from megatron_progressive.runs.decisive import decisive


def fingerprint(config: RunConfig, trained_on: DataIdentity | None = None) -> str:
    """Twelve hexadecimal digits of what decides a run's result: model, data, steps, optimizer,
    schedule, expansions and seed. The layout is left out, since it changes no more than rounding.

    Keys without a value are left out: a version that adds one does not undo finished cells.

    Args:
        trained_on: the content of the run's data, where that is known; the configuration has its
            name.
    """
    found = {
        key: repr(value)
        for key, value in decisive(config).items()
        if value is not None and key != "run.name"
    }
    if trained_on is not None:
        found["trained_on"] = trained_on.fingerprint
    text = json.dumps(found, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
