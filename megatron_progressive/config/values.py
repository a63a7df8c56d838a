"""Values as they were written, and what they mean to a field.

YAML by itself decides what ``2026-11-28``, ``007``, ``no`` or ``1e-3`` is. Here a scalar stays the
text that was written (:class:`Written`) until a field says which kind of value it takes.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_progressive.config.errors import ConfigError

KIND_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {
    spelling: value
    for word, value in (("true", True), ("yes", True), ("on", True),
                        ("false", False), ("no", False), ("off", False))
    for spelling in (word, word.title(), word.upper())
}  # fmt: skip
_SHOWN = 80
"""The most characters of a value that an error repeats."""


class Written(str):
    """The text of a scalar of YAML."""

    plain: bool
    """Whether it was written without quotes, so that it may stand for null, a number, true or
    false."""

    def __new__(cls, text: str, plain: bool = True) -> Written:
        written = super().__new__(cls, text)
        written.plain = plain
        return written


def is_null(value: Any) -> bool:
    """Whether a value is null: ``None``, or a scalar that YAML reads as null."""
    return value is None or (isinstance(value, Written) and value.plain and value in _NULLS)


def shown(value: Any) -> str:
    """A value as the line of an error has it: text in quotes, anything else as it was written,
    shortened."""
    text = _spelled(value, 3)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def _spelled(value: Any, depth: int) -> str:
    if is_null(value):
        return "nothing" if value == "" else "null"
    if isinstance(value, Written) and value.plain and _is_number_or_bool(value):
        return str(value)
    if isinstance(value, str):
        return repr(str(value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list) and not depth:
        return "{…}" if isinstance(value, dict) else "[…]"
    if isinstance(value, list):
        return f"[{', '.join(_spelled(item, depth - 1) for item in value[:20])}]"
    if isinstance(value, dict):
        pairs = list(value.items())[:20]
        return f"{{{', '.join(f'{key}: {_spelled(item, depth - 1)}' for key, item in pairs)}}}"
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to spell thousands of them
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def _is_number_or_bool(text: Written) -> bool:
    return text in _BOOLS or _number(text) is not None


def converted(name: str, value: Any, kind: Any, optional: bool = False) -> Any:
    """A scalar as the type that a field takes: int, float, bool or str.

    Args:
        name: the name of the field.
        value: the scalar as it was written, or a value of Python's.
        kind: the type that the field takes.
        optional: whether the field takes null, too, which gives None.

    Raises:
        ConfigError: the value is of another type.
    """
    if is_null(value) and optional:
        return None
    found = None if is_null(value) else _as_kind(value, kind)
    if found is None:
        accepted = KIND_NAMES[kind] + (", or null" if optional else "") + _hint(value, kind)
        raise ConfigError(f"{name}: got {shown(value)}; accepted: {accepted}")
    return found


def _hint(value: Any, kind: Any) -> str:
    if kind is str and is_null(value) and value:
        return f' ("{value}" in quotes is one)'
    if kind is int and isinstance(value, str) and re.fullmatch(r"[+-]?0[\d_]+", value):
        return " without a zero before it (which is octal to some)"
    return ""


def _as_kind(value: Any, kind: Any) -> Any:
    """The value as ``kind``; None where it is of another type."""
    if kind is bool:
        if isinstance(value, bool):
            return value
        return _BOOLS.get(value) if isinstance(value, Written) and value.plain else None
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        if kind is str:
            return str(value)
        number = _number(value)
        return float(number) if kind is float and number is not None else _whole(number)
    if kind is float and isinstance(value, int | float):
        return _float(value)
    return value if isinstance(value, kind) else None


def _whole(number: int | float | None) -> int | None:
    return number if isinstance(number, int) else None


def _number(text: str) -> int | float | None:
    """The number that a text is. YAML's octal 010 and sexagesimal 1:30 are no integers here:
    somebody who writes them means ten, or a time."""
    if not text.isascii() or text != text.strip() or len(text) > 1000:
        return None
    sign, bare = (text[:1], text[1:]) if text[:1] in ("+", "-") else ("", text)
    if bare.lower() in (".inf", ".nan"):
        return float(sign + bare[1:])
    try:
        number = int(text, 0)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return None
    return number


def _float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer that no float comes near
        return float("inf") if number > 0 else float("-inf")
