"""Finds how many rows of a parquet file may be decoded at once, from its page headers. Called by parquet.py.

    group, *others = row_groups(file, name)
    rows = batch_rows(group, metadata.schema, file, name, ("text",))

A page of a few kB may unpack to gigabytes, and a dictionary or shared prefixes may repeat one long text in every row.
The sizes in the footer cannot be trusted for that. Arrow reads the header of each page, in Thrift's compact protocol,
so this module reads the same headers first. It parses the footer too, because pyarrow 25 aborts the process on a column
chunk that contradicts itself.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from storage.errors import FatalError

MAX_PAGE_BYTES = 1 << 29
"""Unpacked bytes of the largest page that is read; writers make pages of about 1 MB."""

MAX_PAGE_VALUES = 10_000_000
"""Values of the largest page of a list column; writers put 20,000 rows or 1 MB into a page."""

MAX_BATCH_ROWS = 64
"""Rows per batch; some documents have many megabytes."""

MAX_BATCH_BYTES = 1 << 28
"""Bytes that the decoded rows of a batch may take; a single row may take more."""

Columns = Collection[str]

Chunk = Mapping[int, Any]
"""ColumnMetaData of a column chunk, from the footer, by Thrift field number."""

NUM_VALUES, TOTAL_COMPRESSED_SIZE, DATA_PAGE_OFFSET, DICTIONARY_PAGE_OFFSET = 5, 7, 9, 11

_MAX_HEADER_BYTES = 1 << 24  # Arrow refuses longer ones

_MAX_DEPTH = 16


def row_groups(file: BinaryIO, name: str) -> list[list[Chunk]]:
    """The column chunks of each row group, from the footer. FatalError: the footer cannot be parsed."""
    end = file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(0, end - length))
    try:
        footer, _ = _struct(file.read(length), 0, 0)
        return [[column[3] for column in group[1]] for group in footer[4]]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise FatalError(f"{name} is damaged: its footer cannot be read; fetch it again", name) from error


def batch_rows(group: Sequence[Chunk], schema: pq.ParquetSchema, file: BinaryIO, name: str, columns: Columns) -> int:
    """Rows of a row group to decode at once, so that they take at most MAX_BATCH_BYTES bytes: 1 to MAX_BATCH_ROWS.

    Reads the page headers of `columns` and their nested columns; errors cite the file as `name`.

    FatalError: a page of more than MAX_PAGE_BYTES bytes or MAX_PAGE_VALUES values, or a damaged header.
    """
    largest = 1
    for number, chunk in enumerate(group):
        column = schema.column(number)
        if column.path.split(".")[0] not in columns:
            continue
        for size, values in _pages(file, chunk, name):
            if size > MAX_PAGE_BYTES or (column.max_repetition_level and values > MAX_PAGE_VALUES):
                raise FatalError(
                    f"{name}: a page of its column {column.path} unpacks to {size:,} bytes and {values:,} values, as "
                    "no text does; write the file again with smaller pages, or leave it out",
                    name,
                )
            largest = max(largest, size)
    return max(1, min(MAX_BATCH_ROWS, MAX_BATCH_BYTES // largest))


def _pages(file: BinaryIO, chunk: Chunk, name: str) -> Iterator[tuple[int, int]]:
    """Yields (unpacked bytes, values) of each page of a column chunk, from the page headers."""
    values, length, at = (chunk.get(field) for field in (NUM_VALUES, TOTAL_COMPRESSED_SIZE, DATA_PAGE_OFFSET))
    dictionary = chunk.get(DICTIONARY_PAGE_OFFSET)
    if not (isinstance(values, int) and isinstance(length, int) and isinstance(at, int)):
        raise FatalError(f"{name} is damaged: its footer does not say where its pages are; fetch it again", name)
    if values <= 0:  # Arrow does not read such a column, and it may have no page
        return
    if isinstance(dictionary, int) and 0 < dictionary < at:
        at = dictionary
    end = at + length
    while at < end:
        header, length = _header(file, at, name)
        size, packed = header.get(2), header.get(3)
        if not isinstance(size, int) or not isinstance(packed, int) or size < 0 or packed < 0:
            raise _damaged(name, at)
        inner: Any = next((header[field] for field in (5, 7, 8) if isinstance(header.get(field), dict)), {})
        values = inner.get(1)
        yield size, values if isinstance(values, int) else 0
        at += length + packed


def _header(file: BinaryIO, at: int, name: str) -> tuple[dict[int, Any], int]:
    """(fields by number, size in bytes) of the page header at an offset."""
    window = 1 << 12
    while at >= 0 and window <= _MAX_HEADER_BYTES:
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
    return FatalError(f"{name} is damaged: no page at byte {at:,}; fetch it again", name)


# ---- Thrift's compact protocol -----------------------------------------------------------------------------


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """(value by field number, offset after the struct). IndexError: `data` ends inside it; ValueError: not Thrift."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    fields: dict[int, Any] = {}
    field = 0
    while kind := data[at]:
        at += 1
        if kind >> 4:
            field += kind >> 4
        else:
            field, at = _varint(data, at)
        kind &= 15
        fields[field], at = (kind == 1, at) if kind in (1, 2) else _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2, 3):
        return data[at], at + 1
    if kind in (4, 5, 6):
        raw, at = _varint(data, at)
        return (raw >> 1) ^ -(raw & 1), at
    if kind == 7:
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
    raise ValueError(f"no type {kind} in Parquet")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
        shift += 7
    raise ValueError("a number without end")
