"""Computes from the page headers of a parquet file how many rows may be decoded at once, for parquet.py.

    group, *others = row_groups(file, name)
    rows = batch_rows(group, metadata.schema, file, name, ("text",))

A page of a few kB may unpack to gigabytes, and a dictionary or shared prefixes may repeat one long text in every row.
The sizes in the footer are not reliable. Arrow reads the header of each page, in Thrift's compact protocol, so this
module reads the same headers first. It also parses the footer, because pyarrow 25 aborts the process if a column chunk
contradicts itself.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from storage.errors import FatalError

MAX_PAGE_BYTES = 1 << 29
"""Maximum unpacked bytes per page; writers usually create pages of about 1 MB."""

MAX_PAGE_VALUES = 10_000_000
"""Maximum values per page of a list column; writers usually put 20,000 rows or 1 MB into a page."""

MAX_BATCH_ROWS = 64
"""Maximum rows per batch, because some documents have many megabytes."""

MAX_BATCH_BYTES = 1 << 28
"""Maximum bytes of the decoded rows of a batch; a single row may exceed it."""

Columns = Collection[str]

_MAX_HEADER_BYTES = 1 << 24  # Arrow rejects longer headers

_MAX_DEPTH = 16


@dataclass(frozen=True)
class ColumnChunk:
    """Number of values of a column chunk, and the bytes `[start, end)` of its pages, according to the footer."""

    values: int
    start: int
    end: int


def row_groups(file: BinaryIO, name: str) -> list[list[ColumnChunk]]:
    """Returns the column chunks of each row group. Raises FatalError if the footer cannot be parsed."""
    end = file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(0, end - length))
    try:
        footer, _ = _struct(file.read(length), 0, 0)
        return [[_column_chunk(column) for column in group[1]] for group in footer[4]]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise FatalError(f"{name} is damaged: its footer cannot be parsed; download it again", name) from error


def _column_chunk(column: Any) -> ColumnChunk:
    """Returns the chunk of an entry of the footer.

    Raises ValueError if a field is missing or no number, or negative although the chunk has values.
    """
    match column:
        case {3: {5: int(values), 7: int(length), 9: int(start)} as metadata}:
            dictionary = metadata.get(11)
            if isinstance(dictionary, int) and 0 < dictionary < start:
                start = dictionary
            if values == 0 or min(values, length, start) >= 0:
                return ColumnChunk(values, start, start + length)
    raise ValueError("a column chunk does not list its pages")


def batch_rows(
    group: Sequence[ColumnChunk], schema: pq.ParquetSchema, file: BinaryIO, name: str, columns: Columns
) -> int:
    """Returns how many rows to decode at once, 1 to MAX_BATCH_ROWS, so that they take at most MAX_BATCH_BYTES bytes.

    Reads the page headers of `columns` and their nested columns in one row group. Errors cite the file as `name`.

    Raises FatalError if a page has more than MAX_PAGE_BYTES bytes, a page of a list column more than MAX_PAGE_VALUES
    values, or a header is damaged.
    """
    largest = 1
    for number, chunk in enumerate(group):
        column = schema.column(number)
        if column.path.split(".")[0] not in columns:
            continue
        for size, values in _pages(file, chunk, name):
            if size > MAX_PAGE_BYTES or (column.max_repetition_level and values > MAX_PAGE_VALUES):
                raise FatalError(
                    f"{name}: a page of its column {column.path} unpacks to {size:,} bytes and {values:,} values, "
                    "which text never does; rewrite the file with smaller pages, or remove it from the corpus folder",
                    name,
                )
            largest = max(largest, size)
    return max(1, min(MAX_BATCH_ROWS, MAX_BATCH_BYTES // largest))


def _pages(file: BinaryIO, chunk: ColumnChunk, name: str) -> Iterator[tuple[int, int]]:
    """Yields the unpacked size in bytes and the number of values of each page of a chunk, from the page headers."""
    if chunk.values == 0:  # Arrow does not read such a column, which may have no page
        return
    at, file_size = chunk.start, file.seek(0, os.SEEK_END)
    while at < chunk.end:
        if at >= file_size:
            raise _damaged(name, at)
        header, length = _header(file, at, name)
        size, packed = header.get(2), header.get(3)
        if not isinstance(size, int) or not isinstance(packed, int) or size < 0 or packed < 0:
            raise _damaged(name, at)
        inner: Any = next((header[field] for field in (5, 7, 8) if isinstance(header.get(field), dict)), {})
        values = inner.get(1)
        yield size, values if isinstance(values, int) else 0
        at += length + packed


def _header(file: BinaryIO, at: int, name: str) -> tuple[dict[int, Any], int]:
    """Returns the fields of the page header at an offset, by number, and its size in bytes."""
    window = 1 << 12
    while window <= _MAX_HEADER_BYTES:
        file.seek(at)
        data = file.read(window)
        try:
            return _struct(data, 0, 0)
        except IndexError:  # the header is longer than the window
            if len(data) < window:
                break
        except ValueError:
            break
        window *= 16
    raise _damaged(name, at)


def _damaged(name: str, at: int) -> FatalError:
    return FatalError(f"{name} is damaged: no page at byte {at:,}; download it again", name)


# ---- Thrift's compact protocol -----------------------------------------------------------------------------


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """Parses a struct. Returns its values by field number and the offset after it.

    Raises IndexError if `data` ends inside the struct, and ValueError if `data` is not Thrift.
    """
    fields: dict[int, Any] = {}
    field = 0
    while kind := data[at]:
        at += 1
        if kind >> 4:
            field += kind >> 4
        else:
            field, at = _integer(data, at)
        kind &= 15
        if field in fields:  # which of the two values Arrow would use depends on their types
            raise ValueError(f"field {field} occurs twice")
        fields[field], at = (kind == 1, at) if kind in (1, 2) else _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _MAX_DEPTH:
        raise ValueError("the value is nested too deeply")
    if kind in (1, 2, 3):
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 7:
        if at + 8 > len(data):  # without this check, a list of a few bytes could claim any number of them
            raise IndexError("the data end inside a double")
        return None, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind in (9, 10):
        count, inner = data[at] >> 4, data[at] & 15
        at += 1
        if count == 15:
            count, at = _varint(data, at)
        values = []
        for _ in range(count):
            value, at = _value(data, at, inner, depth + 1)
            values.append(value)
        return values, at
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise ValueError(f"Parquet has no type {kind}")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    raw, at = _varint(data, at)
    return (raw >> 1) ^ -(raw & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
        shift += 7
    raise ValueError("a varint does not end")
