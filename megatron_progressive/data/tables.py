"""The text column of tables: CSV and TSV with a header, Parquet, and Arrow."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError
from megatron_progressive.data.decoding import NotText, Stream, decoded, one_line
from megatron_progressive.data.records import field_error, text_of
from megatron_progressive.data.tally import NO_COLUMN, WITHOUT_TEXT


def csv_documents(stream: Stream, field: str, delimiter: str) -> Iterator[str]:
    """The texts in column ``field`` of a CSV or TSV file with a header.

    Args:
        stream: the open file.
        field: the name of the column.
        delimiter: the usual delimiter of such files; where the header has ``field`` only with
            another delimiter, that one is used.

    Raises:
        NotText: there is no such column.
        ConfigError: a row is longer or shorter than the header, or quotes are out of place.
    """
    csv.field_size_limit(sys.maxsize)
    path = stream.path
    first_line = next(iter(decoded(stream.head.lstrip()).splitlines()), "")
    for other in (delimiter, *",;\t|"):  # tables of other countries' spreadsheets
        if field in _columns(next(csv.reader([first_line], delimiter=other), [])):
            delimiter = other
            break
    file = io.TextIOWrapper(stream.file, "utf-8", "surrogateescape", newline="")
    rows = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        header = _columns(next((row for row in rows if row), []))
        if field not in header:
            error = field_error(field, path, header, "which is no column")
            raise NotText(NO_COLUMN if header else WITHOUT_TEXT, error)
        column = header.index(field)
        for row in rows:
            if row and len(row) != len(header):
                raise ConfigError(
                    f"data.corpus: got {path}, with {len(row)} columns at line {rows.line_num}; "
                    f"accepted: {len(header)} columns, as in its header"
                )
            if row:
                yield row[column]
    except csv.Error as error:
        raise ConfigError(
            f"data.corpus: got {path}, which is not CSV at line {rows.line_num} "
            f"({one_line(error)}); accepted: a table with a header, fields in double quotes "
            "where they hold a delimiter, a quote or a line end"
        ) from None


def _columns(header: list[str]) -> list[str]:
    return [name.strip() for name in header]


def parquet_documents(stream: Stream, field: str) -> Iterator[str]:
    """The texts in column ``field`` of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(_seekable(stream)) as file:
            _check_column(field, stream.path, file.schema_arrow)
            yield from file.iter_batches(batch_size=256, columns=[field])

    return _column_texts(batches, field, stream.path, "a Parquet file")


def arrow_documents(stream: Stream, field: str) -> Iterator[str]:
    """The texts in a file of Arrow's inter-process format, or in a stream that the ``datasets``
    library saves."""
    import pyarrow
    import pyarrow.ipc

    def batches() -> Iterator[Any]:
        source = _seekable(stream)
        is_file = stream.head.startswith(b"ARROW1")
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        with reader:
            _check_column(field, stream.path, reader.schema)
            if is_file:
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                yield from reader

    return _column_texts(batches, field, stream.path, "an Arrow file")


def _seekable(stream: Stream) -> Any:
    """The file as Arrow reads it: the one on disk, or all of what it decompresses to."""
    import pyarrow

    if stream.is_compressed:
        return pyarrow.BufferReader(stream.file.read())
    return pyarrow.OSFile(os.fsencode(stream.path))


def _check_column(field: str, path: Path, schema: Any) -> None:
    if not _way(field, schema):
        raise field_error(field, path, _column_names(schema), "which is not there")


def _way(field: str, columns: Any) -> list[str]:
    """The names that lead to a column through structs, outermost first; none where it is not
    there."""
    names = [column.name for column in columns]
    if field in names:
        return [field]
    outer, dot, inner = field.partition(".")
    if not dot or outer not in names:
        return []
    rest = _way(inner, _fields(columns[names.index(outer)]))
    return [outer, *rest] if rest else []


def _fields(column: Any) -> list[Any]:
    """The fields of a struct; none of any other column."""
    from pyarrow import types

    return list(column.type) if types.is_struct(column.type) else []


def _column_names(columns: Any, before: str = "") -> Iterator[str]:
    for column in columns:
        if fields := _fields(column):
            yield from _column_names(fields, f"{before}{column.name}.")
        else:
            yield before + column.name


def _column_texts(
    batches: Callable[[], Iterator[Any]], field: str, path: Path, accepted: str
) -> Iterator[str]:
    import pyarrow
    import pyarrow.compute
    from pyarrow import types

    try:
        for batch in batches():
            outer, *inner = _way(field, list(batch.schema))
            column = batch.column(batch.schema.get_field_index(outer))
            if inner:
                column = pyarrow.compute.struct_field(column, inner)
            # as bytes: one that is no UTF-8 would stop the conversion of all rows
            if types.is_string(column.type) or types.is_large_string(column.type):
                column = column.cast(pyarrow.large_binary())
            for start in range(0, len(column), 256):
                for value in column.slice(start, 256).to_pylist():
                    text = decoded(value) if isinstance(value, bytes) else value
                    yield text_of({field: text}, field, path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f"data.corpus: got {path} ({one_line(error)}); accepted: {accepted}"
        ) from None
