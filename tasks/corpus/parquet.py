"""Documents out of a parquet file: the {id, text} export of OSCAR 2019, or any with a column `text` or `content`.

Called by reader.py. Memory is bounded by a few pages and what parquet_pages.py allows to be decoded at once, whatever
the size of the row groups.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import FatalError
from tasks.corpus.document import FIELDS, Document, Tally, labels_of, unknown_schema_error
from tasks.corpus.lines import UnpackedSize, packing_of, reading_error
from tasks.corpus.parquet_pages import batch_rows, row_groups
from tasks.recipe.config import CorpusSettings

_METADATA = ("metadata", "meta")


def rows_of_parquet(
    path: Path, chunks: Iterable[bytes], name: str, tally: Tally, folder: Path, corpus: CorpusSettings
) -> Iterator[Document]:
    """Every row as a document, `line` being its row; null, wrong UTF-8 and longer than a line may be are quarantined.

    Parquet has its footer at the end, so a packed file is unpacked into `folder` first; `chunks` is it unpacked.
    FatalError: no text column, damaged or cut short, pages or a text of a size that is no text's.
    """
    with path.open("rb") as file:
        packed = bool(packing_of(file.read(4)))
    if packed:
        path = folder / "unpacked.parquet"
        with path.open("wb") as out:
            out.writelines(chunks)
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as parquet, path.open("rb") as file:
            yield from _rows(parquet, file, name, tally, corpus)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of the name of a column
        raise reading_error(error, name) from error
    finally:
        if packed:
            path.unlink()


def _rows(
    parquet: pq.ParquetFile, file: BinaryIO, name: str, tally: Tally, corpus: CorpusSettings
) -> Iterator[Document]:
    schema = parquet.schema_arrow
    field = next((field for field in FIELDS if field in schema.names and _is_text(schema.field(field).type)), "")
    if not field:
        raise unknown_schema_error(
            name, f"parquet columns {', '.join(one[:40] for one in schema.names[:8])} without {' or '.join(FIELDS)}"
        )
    tally.schema = "parquet"
    metadata = next((column for column in _METADATA if column in schema.names), "")
    growth = UnpackedSize(name, file.seek(0, os.SEEK_END), corpus.max_unpacked_ratio)
    for batch in record_batches(parquet, file, name, [field, metadata] if metadata else [field]):
        texts = batch.column(field).cast(pa.large_binary()).to_pylist()
        labels = batch.column(metadata).to_pylist() if metadata else [None] * len(texts)
        for text, label in zip(texts, labels, strict=True):
            tally.lines += 1
            growth.add(len(text or b"") + 1)
            fault, chars = _measured(text, corpus.max_line_bytes)
            if fault:
                tally.quarantine(tally.lines, fault, text or b"")
                continue
            tally.documents += 1
            yield Document(text, chars, tally.lines, labels_of(label))


def record_batches(
    parquet: pq.ParquetFile, file: BinaryIO, name: str, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of some or all columns, so many at once as its pages allow; `file` are its bytes, opened once more."""
    looked_at = columns or parquet.schema_arrow.names
    groups = row_groups(file, name)
    if [len(group) for group in groups] != [parquet.metadata.num_columns] * parquet.metadata.num_row_groups:
        raise FatalError(f"{name} is damaged: its footer contradicts itself; fetch it again", name)
    for number, group in enumerate(groups):
        rows = batch_rows(group, parquet.schema, file, name, looked_at)
        yield from parquet.iter_batches(rows, row_groups=[number], columns=columns, use_threads=False)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _measured(text: bytes | None, limit: int) -> tuple[str, int]:
    """(what is wrong with it or empty, number of characters)."""
    if text is None:
        return "null", 0
    if len(text) > limit:
        return f"a text of {len(text):,} bytes", 0
    try:
        return "", len(text.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start + 1})", 0
