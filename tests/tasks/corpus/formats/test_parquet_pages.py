"""Footers of parquet that no writer makes: each is refused by name, at once and in bounded memory."""

import io
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import FatalError
from tasks.corpus.formats.parquet_pages import MAX_BATCH_ROWS, ColumnChunk, batch_rows, row_groups

I64, DOUBLE, LIST, STRUCT = 6, 7, 9, 12
"""Types of Thrift's compact protocol."""


def varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def integer(value: int) -> bytes:
    return varint(2 * value if value >= 0 else -2 * value - 1)


def struct(*fields: tuple[int, int, bytes], short: bool = True) -> bytes:
    """A struct of (number, type, value) fields, with a field's number as the distance to the last one if `short`."""
    data, last = b"", 0
    for number, kind, value in fields:
        short_form = short and 0 < number - last < 16
        data += bytes([(number - last) << 4 | kind]) if short_form else bytes([kind]) + integer(number)
        data, last = data + value, number
    return data + b"\0"


def items(kind: int, *values: bytes) -> bytes:
    return bytes([0xF0 | kind]) + varint(len(values)) + b"".join(values)


def metadata(values: int = 40, length: int = 100, start: int = 4) -> bytes:
    return struct((5, I64, integer(values)), (7, I64, integer(length)), (9, I64, integer(start)))


def footer(*column: tuple[int, int, bytes], short: bool = True) -> bytes:
    """A footer with one row group that has one column chunk, with these fields."""
    group = struct((1, LIST, items(STRUCT, struct(*column, short=short))), short=short)
    return struct((4, LIST, items(STRUCT, group)), short=short)


def file_of(footer: bytes) -> io.BytesIO:
    return io.BytesIO(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")


GOOD = (3, STRUCT, metadata())
REFUSED = {
    "no footer": b"",
    "no row groups": struct((1, I64, integer(1))),
    "row groups are a number": struct((4, I64, integer(1))),
    "a row group is a number": struct((4, LIST, items(I64, integer(1)))),
    "no column chunk": footer((2, I64, integer(4))),
    "a column chunk is a number": footer((3, I64, integer(4))),
    "a column chunk is a list": footer((3, LIST, items(I64, *map(integer, range(12))))),
    "no offset": footer((3, STRUCT, struct((5, I64, integer(1)), (7, I64, integer(1))))),
    "the offset is a list": footer(
        (3, STRUCT, struct((5, I64, integer(1)), (7, I64, integer(1)), (9, LIST, items(I64, integer(4)))))
    ),
    "a negative offset": footer((3, STRUCT, metadata(start=-4))),
    "a negative length": footer((3, STRUCT, metadata(length=-1))),
    "a field twice": footer(GOOD, (3, STRUCT, metadata(start=50))),
    "a field twice, of two types": footer(GOOD, (3, I64, integer(1))),
    "a list of 2 ** 60 doubles": struct((1, LIST, bytes([0xF0 | DOUBLE]) + varint(1 << 60))),
    "a string of 2 ** 63 bytes": struct((1, 8, varint(1 << 63))),
    "lists in lists": bytes([1 << 4 | LIST]) + bytes([1 << 4 | LIST]) * 5000,
    "structs in structs": bytes([1 << 4 | STRUCT]) * 5000,
    "a varint without an end": bytes([1 << 4 | I64]) + b"\xff" * 50,
    "an unknown type": struct((1, 13, b"\0")),
}


@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
def test_both_forms_of_a_field_are_read(short: bool) -> None:
    assert row_groups(file_of(footer(GOOD, short=short)), "a.parquet") == [[ColumnChunk(40, 4, 104)]]


def test_a_dictionary_before_the_data_is_the_first_page() -> None:
    fields = ((5, 40), (7, 100), (9, 60), (11, 4))
    chunk = (3, STRUCT, struct(*((number, I64, integer(value)) for number, value in fields)))
    assert row_groups(file_of(footer(chunk)), "a.parquet") == [[ColumnChunk(40, 4, 104)]]


def test_a_column_without_values_has_no_pages_wherever_its_footer_claims_them() -> None:
    file = file_of(footer((3, STRUCT, metadata(values=0, length=-1, start=-4))))
    ((chunk,),) = row_groups(file, "a.parquet")
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["un"]}), table)
    schema = pq.ParquetFile(table).schema
    assert batch_rows([chunk], schema, file, "a.parquet", ("text",)) == MAX_BATCH_ROWS


@pytest.mark.parametrize("reason", REFUSED)
def test_a_footer_that_no_writer_makes_is_refused(reason: str) -> None:
    with pytest.raises(FatalError, match=r"^a\.parquet is damaged: its footer cannot be parsed; download it again"):
        row_groups(file_of(REFUSED[reason]), "a.parquet")


@pytest.mark.parametrize("start", [10**6, (1 << 63) - 1])
def test_a_page_behind_the_end_of_the_file_is_damage(start: int) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["un"]}), file)
    schema = pq.ParquetFile(file).schema
    with pytest.raises(FatalError, match=re.escape(f"a.parquet is damaged: no page at byte {start:,}")):
        batch_rows([ColumnChunk(1, start, start + 1)], schema, file, "a.parquet", ("text",))


def test_the_chunks_are_those_that_pyarrow_reads() -> None:
    file = io.BytesIO()
    table = pa.table({"text": [f"{number} mieux" for number in range(5000)], "id": range(5000)})
    pq.write_table(table, file, row_group_size=2000)
    parsed = pq.ParquetFile(file).metadata
    groups = row_groups(file, "a.parquet")
    assert len(groups) == parsed.num_row_groups == 3
    for number, group in enumerate(groups):
        columns = [parsed.row_group(number).column(index) for index in range(parsed.num_columns)]
        assert group == [
            ColumnChunk(
                column.num_values,
                column.dictionary_page_offset or column.data_page_offset,
                (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size,
            )
            for column in columns
        ]
