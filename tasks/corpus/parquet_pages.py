"""How large the pages of a parquet file become when they are read, before any of them is. Called by parquet.py.

    group, *others = row_groups(file, name)
    rows = batch_rows(group, metadata.schema, file, name, ("text",))    # so many may be decoded at once

A page of a few kB may unpack to gigabytes, and a dictionary or shared prefixes may stand for the same long text in
every row. What the footer says of that is only said; each page has a header of its own that Arrow goes by, in Thrift's
compact form, and so do we. The footer too is read here: asked for a column chunk that contradicts itself, pyarrow 25
aborts the process.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from storage.errors import FatalError

PAGE = 1 << 29
"""Bytes of the largest page that is read; writers make pages of about 1 MB."""

VALUES = 10_000_000
"""Values of the largest page of a column of lists; writers put 20,000 rows or 1 MB into one."""

BATCH = 64
"""Rows that are decoded at once; documents of many megabytes exist."""

HELD = 1 << 28
"""Bytes that the rows decoded at once may take, as long as none is larger by itself."""

Columns = Collection[str]

Chunk = Mapping[int, Any]
"""What the footer says of a column chunk (ColumnMetaData of the format), by field number."""

NUM_VALUES, COMPRESSED_SIZE, DATA_PAGE, DICTIONARY_PAGE = 5, 7, 9, 11

_HEADER = 1 << 24  # Arrow refuses longer ones

_DEPTH = 16


def row_groups(file: BinaryIO, name: str) -> list[list[Chunk]]:
    """The column chunks of each row group, by the footer of a file that has one. FatalError: it cannot be told."""
    end = file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(0, end - length))
    try:
        footer, _ = _struct(file.read(length), 0, 0)
        return [[column[3] for column in group[1]] for group in footer[4]]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise FatalError(f"{name} is damaged: its footer cannot be read; fetch it again", name) from error


def batch_rows(group: Sequence[Chunk], schema: pq.ParquetSchema, file: BinaryIO, name: str, columns: Columns) -> int:
    """Rows of a row group to decode at once so that they take HELD bytes at most: BATCH, fewer where pages are large.

    Looks at the pages of `columns` and what is nested in them; `name` is what errors call the file. FatalError: a page
    of more than PAGE bytes or VALUES values, or one that cannot be told.
    """
    largest = 1
    for number, chunk in enumerate(group):
        column = schema.column(number)
        if column.path.split(".")[0] not in columns:
            continue
        for size, values in _pages(file, chunk, name):
            if size > PAGE or (column.max_repetition_level and values > VALUES):
                raise FatalError(
                    f"{name}: a page of its column {column.path} unpacks to {size:,} bytes and {values:,} values, as "
                    "no text does; write the file again with smaller pages, or leave it out",
                    name,
                )
            largest = max(largest, size)
    return max(1, min(BATCH, HELD // largest))


def _pages(file: BinaryIO, chunk: Chunk, name: str) -> Iterator[tuple[int, int]]:
    """(unpacked bytes, values) of each page of a column chunk, by its header."""
    values, length, at = (chunk.get(field) for field in (NUM_VALUES, COMPRESSED_SIZE, DATA_PAGE))
    dictionary = chunk.get(DICTIONARY_PAGE)
    if not (isinstance(values, int) and isinstance(length, int) and isinstance(at, int)):
        raise FatalError(f"{name} is damaged: its footer does not say where its pages are; fetch it again", name)
    if values <= 0:  # such a column is not read, and may have no page
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
    """The header of the page at an offset, by field number, and its bytes."""
    window = 1 << 12
    while at >= 0 and window <= _HEADER:
        file.seek(at)
        data = file.read(window)
        try:
            return _struct(data, 0, 0)
        except IndexError:  # its end is not in the window
            if len(data) < window:
                break
        except ValueError:
            break
        window *= 16
    raise _damaged(name, at)


def _damaged(name: str, at: int) -> FatalError:
    return FatalError(f"{name} is damaged: there is no page at byte {at:,}; fetch it again", name)


# ---- Thrift's compact form ---------------------------------------------------------------------------------


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """(field number -> value, offset behind it). IndexError: goes on behind `data`; ValueError: no such form."""
    if depth > _DEPTH:
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
