"""The knobs of growth that a grid spans by lists of their own, in its key ``expansion``: where new
layers go and what they start from, how the learning rate climbs after τ, and the lengths of the
stages of gradual stacking."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_progressive.config import ConfigError, check_value
from megatron_progressive.config.values import converted, is_null, shown

ORDER, INSERT, BLOCK, STATE = "order", "insert", "block", "optimizer_state"
REWARM, REWARM_FROM, REWARM_LAYERS = "rewarm", "rewarm_from", "rewarm_layers"
STAGES = "stages"
AFTER = (REWARM, REWARM_FROM, REWARM_LAYERS)
"""Fields of ``schedule`` that say what follows an expansion, of any arm that grows."""
KNOBS = (ORDER, INSERT, BLOCK, STATE, STAGES, *AFTER)
"""All of them, in the order in which names of cells have them."""
NONE = "none"
"""The text of a value that is null."""

_PREFIX = {BLOCK: "block", REWARM: "rewarm", REWARM_FROM: "from", REWARM_LAYERS: "of",
           STAGES: "stages"}  # fmt: skip
"""What tells a value in a cell's name from another knob's."""


@dataclass(frozen=True)
class Value:
    """One value of a knob."""

    text: str
    """How names and labels have it."""
    value: Any


Spread = dict[str, list[Value]]
"""The values of each knob that a grid spans."""


@dataclass(frozen=True)
class Choice:
    """One value of each knob that makes a difference to a run."""

    values: Mapping[str, Value]

    @property
    def axes(self) -> dict[str, str]:
        """The texts of the values, by the knob."""
        return {key: found.text for key, found in self.values.items()}

    @property
    def name(self) -> list[str]:
        """What they add to a cell's name."""
        return [f"{_PREFIX.get(key, '')}{found.text}" for key, found in self.values.items()]

    @property
    def expansion(self) -> dict[str, Any]:
        """The fields of the expansion that they set."""
        return {k: v.value for k, v in self.values.items() if k not in (*AFTER, STAGES)}

    @property
    def schedule(self) -> dict[str, Any]:
        """The fields of the schedule that they set."""
        return {key: found.value for key, found in self.values.items() if key in AFTER}


def spread_of(values: Mapping[str, Any]) -> Spread:
    """The knobs that a grid's ``expansion`` spans, checked one by one, in the order of names.

    Raises:
        ConfigError: a value is no list, or is not accepted by the field.
    """
    found: Spread = {}
    for key in KNOBS:
        if key not in values:
            continue
        name, listed = f"expansion.{key}", values[key]
        if not isinstance(listed, list):
            raise ConfigError(f"{name}: got {shown(listed)}; accepted: a list")
        found[key] = [_value(key, name, item) for item in listed]
        texts = [one.text for one in found[key]]
        for text in texts:
            if key in _PREFIX and texts.count(text) > 1:
                raise ConfigError(f"{name}: got {text} twice; accepted: a list of different values")
    return found


def _value(key: str, name: str, item: Any) -> Value:
    if key == BLOCK:
        return _block(name, item)
    if key == STAGES:
        return _stages(name, item)
    if key in AFTER:
        kind = str if key == REWARM_LAYERS else float
        value = converted(name, item, kind, optional=True)
        check_value(name, value, like=f"schedule.{key}")
        text = NONE if value is None else value if kind is str else f"{value:g}"
        return Value(text, value)
    value = converted(name, item, str)
    check_value(name, value, like=name)
    return Value(value, value)


def _block(name: str, item: Any) -> Value:
    """A block of layers to copy; null is the one that ``insert`` has by itself."""
    if is_null(item):
        return Value(NONE, None)
    if not isinstance(item, list) or len(item) != 2:
        raise ConfigError(
            f"{name}: got {shown(item)}; accepted: a list of blocks [first, last], or null"
        )
    block = [converted(name, end, int) for end in item]
    for end in block:
        check_value(name, end, like="expansion.block")
    return Value(f"{block[0]}-{block[1]}", block)


def _stages(name: str, item: Any) -> Value:
    """The relative lengths of the stages of gradual stacking."""
    accepted = "accepted: lists of the relative lengths of stages, numbers above 0"
    if not isinstance(item, list) or len(item) < 2:
        raise ConfigError(f"{name}: got {shown(item)}; {accepted}")
    lengths = [converted(name, length, float) for length in item]
    if not all(0 < length < math.inf for length in lengths):
        raise ConfigError(f"{name}: got {shown(item)}; {accepted}")
    return Value("_".join(f"{length:g}" for length in lengths), lengths)


def choices(
    spread: Spread, source: int, init: str, only: Collection[str] = KNOBS
) -> Iterator[Choice]:
    """The combinations of the knobs ``only``, without those that make no difference: the order in
    which fewer than two layers are copied, a side of no layers, a block and the optimizer state
    where nothing is copied, and how a rate climbs that does not."""
    copied = init.startswith("copying")
    skipped = {STAGES}
    skipped |= {ORDER} if not copied or source < 2 else set()
    skipped |= {BLOCK} if not copied or not source else set()
    skipped |= {INSERT} if not source else set()
    axes = {key: values for key, values in spread.items() if key in only and key not in skipped}
    if STATE in axes and not copied:
        axes[STATE] = [one for one in axes[STATE] if one.value != "copy"]
    yield from _combined({key: values for key, values in axes.items() if values})


def stage_choices(spread: Spread) -> Iterator[Choice]:
    """The combinations of what gradual stacking, whose growth is its own, has of the knobs."""
    yield from _combined({k: v for k, v in spread.items() if k in (STAGES, *AFTER) and v})


def _combined(axes: Spread) -> Iterator[Choice]:
    seen = set()
    for found in itertools.product(*axes.values()):
        values = dict(zip(axes, found, strict=True))
        if REWARM in values and not values[REWARM].value:
            values = {k: v for k, v in values.items() if k not in (REWARM_FROM, REWARM_LAYERS)}
        choice = Choice(values)
        if (told := tuple(choice.axes.items())) not in seen:
            seen.add(told)
            yield choice


def stage_ends(choice: Choice, depths: Sequence[int], size: str) -> list[float]:
    """The fractions of the steps after which gradual stacking grows: equal stages, or those of the
    choice.

    Raises:
        ConfigError: it has another number of lengths than there are depths.
    """
    lengths = choice.values[STAGES].value if STAGES in choice.values else [1] * len(depths)
    if len(lengths) != len(depths):
        raise ConfigError(
            f"expansion.{STAGES}: got {len(lengths)} lengths for size {size}, whose stages have "
            f"{', '.join(map(str, depths))} layers; accepted: {len(depths)} lengths"
        )
    ends = itertools.accumulate(lengths)
    return [round(end / sum(lengths), 4) for end in ends][:-1]
