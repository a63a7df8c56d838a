"""The text of records, and of JSON on lines, in arrays, or one value after the other."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any

from megatron_progressive.config import ConfigError
from megatron_progressive.data.decoding import NotText, Stream, decoded
from megatron_progressive.data.tally import NO_RECORDS

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")

LARGEST_VALUE = 64 * 1024 * 1024
"""The most characters of one JSON value that is not on a line of its own."""

_SPACE = re.compile(r"[ \t\n\r]*")


def field_error(data_field: str, where: object, fields: Iterable[str], why: str) -> ConfigError:
    """The error for records in ``where`` whose ``fields`` do not give a text."""
    names = ", ".join(fields) or "none"
    if len(names) > 300:  # the first row of a table that has no header, say
        names = names[:300] + "…"
    return ConfigError(
        f"data.text_field: got {data_field!r}, {why}; accepted: a text field of {where} ({names})"
    )


def text_of(row: Any, field: str, where: object) -> str:
    """The text of one row, which is empty where the field is null.

    Raises:
        ConfigError: the row is no object, or its ``field`` is missing or holds no text.
    """
    if not isinstance(row, dict):
        raise ConfigError(
            f"data.corpus: got {where}, with a line that is no JSON object; accepted: "
            "one JSON object a line"
        )
    if not has_field(row, field):
        raise field_error(field, where, field_names(row), "which is not there")
    text = value_of(row, field)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise field_error(field, where, field_names(row), f"which holds {type(text).__name__}")
    return text


def has_field(row: dict[str, Any], field: str) -> bool:
    """Whether a row has a field: one of that name, or, for ``a.b``, a field ``b`` of the object in
    its field ``a``, and so on. Where ``a`` is null, its fields are, too."""
    if field in row:
        return True
    outer, dot, inner = field.partition(".")
    if not dot or outer not in row:
        return False
    value = row[outer]
    return value is None or (isinstance(value, dict) and has_field(value, inner))


def value_of(row: dict[str, Any], field: str) -> Any:
    """The value of a field that :func:`has_field` finds."""
    if field in row:
        return row[field]
    outer, _, inner = field.partition(".")
    return None if row[outer] is None else value_of(row[outer], inner)


def field_names(row: dict[str, Any], before: str = "") -> Iterator[str]:
    """The names of the fields of a row, as ``data.text_field`` would name them."""
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from field_names(value, f"{before}{name}.")
        else:
            yield before + name


class _NotJson(Exception):
    """Something is not JSON; the argument is its place in the file."""


def is_json(stream: Stream, field: str) -> bool:
    """Whether a file whose name does not tell holds JSON objects with the field ``field``.

    Raises:
        NotText: the file holds lines of JSON objects that lack the field.
    """
    head = stream.head.lstrip()
    if not head.startswith((b"{", b"[")):
        return False
    values: list[Any] = []
    try:
        for value in itertools.islice(_json_values(io.BytesIO(head)), 2):
            values.append(value)
    except _NotJson:
        if stream.is_whole:
            return False  # a program that begins as JSON does
        if not values:  # a document that is longer than the head, perhaps
            begins = re.match(rb'\[?\s*\{\s*"', head)
            name = field.rpartition(".")[2].encode()
            return bool(begins and re.search(rb'"%b"\s*:\s*"' % re.escape(name), head))
    if not values or not all(isinstance(value, dict) for value in values):
        return False
    if has_field(values[0], field) and isinstance(value_of(values[0], field), str):
        return True
    if len(values) > 1 and head.startswith(b"{"):
        names = field_names(values[0])
        error = field_error(field, stream.path, names, "which is not there")
        raise NotText(NO_RECORDS, error)
    return False


def json_documents(stream: Stream, field: str) -> Iterator[str]:
    """The texts of JSON objects that stand on lines, follow each other in any way, or are in
    arrays.

    Raises:
        NotText: the file's name is not one of records, and no record in it has ``field``.
        ConfigError: something further on is not JSON, or a record lacks ``field``.
    """
    path, is_lines = stream.path, stream.suffix in JSON_LINES
    on_lines = bool(stream.begin) or begins_with_line(stream)
    values = _values_on_lines(stream.file) if on_lines else _json_values(stream.file)
    after = f" after byte {stream.begin}" if stream.begin else ""
    begun = False
    try:
        for value in values:
            if not (begun or is_lines):  # settings of some program, say
                if not isinstance(value, dict):
                    raise NotText(NO_RECORDS)
                if not has_field(value, field):
                    names = field_names(value)
                    error = field_error(field, path, names, "which is not there")
                    raise NotText(NO_RECORDS, error)
            begun = True
            yield text_of(value, field, path)
    except _NotJson as error:
        if not (begun or is_lines):
            raise NotText(NO_RECORDS) from None
        raise ConfigError(
            f"data.corpus: got {path}, whose {error}{after} is not JSON or cut short; accepted: "
            "one JSON object a line, or an array of objects"
        ) from None


def begins_with_line(stream: Stream) -> bool:
    """Whether the first line that is not blank is a JSON object, as far as the head of the file
    tells."""
    line, newline, _ = stream.head.lstrip().partition(b"\n")
    if not line.startswith(b"{"):
        return False
    if not newline and not stream.is_whole:
        return True
    try:
        json.loads(decoded(line))
    except (ValueError, RecursionError):
        return False
    return True


def _values_on_lines(file: IO[bytes]) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.startswith(codecs.BOM_UTF8):  # of a file that was appended to another
            line = line[len(codecs.BOM_UTF8) :]
        if line.isspace():
            continue
        try:
            value = json.loads(decoded(line))
        except (ValueError, RecursionError):
            raise _NotJson(f"line {number}") from None
        yield value


def _json_values(file: IO[bytes]) -> Iterator[Any]:
    """JSON values one after the other, and the elements of arrays; no more than one of them at a
    time is held in memory.

    Raises:
        _NotJson: something is not JSON, or a value has more than :data:`LARGEST_VALUE` characters.
    """
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    decode = json.JSONDecoder().raw_decode
    rest, at, ended, in_array, wants_comma = "", 0, False, False, False
    for number in itertools.count(1):
        value: Any = None
        while True:
            at = _SPACE.match(rest, at).end()  # type: ignore[union-attr]
            character = rest[at : at + 1]
            if character == "[" and not in_array:
                in_array, at = True, at + 1
                continue
            if character == "]" and in_array:
                in_array, wants_comma, at = False, False, at + 1
                continue
            if character == "," and wants_comma:
                wants_comma, at = False, at + 1
                continue
            if (wants_comma and character) or (in_array and ended and not character):
                raise _NotJson(f"record {number}")
            if ended and not character:
                return
            if character:
                try:
                    value, at = decode(rest, at)
                    break
                except (ValueError, RecursionError):
                    if ended or len(rest) - at > LARGEST_VALUE:
                        raise _NotJson(f"record {number}") from None
            more = text.read(max(1 << 16, len(rest) - at))
            rest, at, ended = rest[at:] + more, 0, not more
        yield value
        wants_comma = in_array
