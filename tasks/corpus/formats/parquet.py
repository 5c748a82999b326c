"""Reads the documents of a parquet file for reader.py. The file must have a column `text` or `content`.

    for document in read_parquet(path, chunks, name, counts, folder, recipe.corpus): ...

The {id, text} export of OSCAR 2019 is such a file. For row groups of any size, memory is limited to a few pages and the
rows that are decoded at once, whose number is computed by parquet_pages.py.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import FatalError
from tasks.corpus.document import FIELDS, Document, labels_of, unknown_schema_error
from tasks.corpus.filters import text_reason
from tasks.corpus.formats.lines import UnpackedSizeLimit, packing_of, reading_error
from tasks.corpus.formats.parquet_pages import batch_rows, row_groups
from tasks.corpus.quarantine import DocumentCounts
from tasks.recipe.config import CorpusSettings

_METADATA_COLUMNS = ("metadata", "meta")


def read_parquet(
    path: Path, chunks: Iterable[bytes], name: str, counts: DocumentCounts, folder: Path, corpus: CorpusSettings
) -> Iterator[Document]:
    """Yields each row as a document, with the number of the row as `line`, from 1. Records bad rows in `counts`.

    A compressed file is first written to `folder` from its unpacked `chunks`, because the footer of parquet is at the
    end. Raises FatalError if the file has no text column, is damaged or truncated, or unpacks to far more than text.
    """
    with path.open("rb") as file:
        packed = bool(packing_of(file.read(4)))
    if packed:
        path = folder / "unpacked.parquet"
        with path.open("wb") as out:
            out.writelines(chunks)
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as parquet, path.open("rb") as file:
            yield from _rows(parquet, file, name, counts, corpus)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # UnicodeDecodeError: the name of a column
        raise reading_error(error, name) from error
    finally:
        if packed:
            path.unlink()


def _rows(
    parquet: pq.ParquetFile, file: BinaryIO, name: str, counts: DocumentCounts, corpus: CorpusSettings
) -> Iterator[Document]:
    schema = parquet.schema_arrow
    field = next((field for field in FIELDS if field in schema.names and _is_text(schema.field(field).type)), "")
    if not field:
        raise unknown_schema_error(
            name,
            f"parquet columns {', '.join(column[:40] for column in schema.names[:8])} without {' or '.join(FIELDS)}",
        )
    counts.schema = "parquet"
    metadata = next((column for column in _METADATA_COLUMNS if column in schema.names), "")
    unpacked = UnpackedSizeLimit(name, file.seek(0, os.SEEK_END), corpus.max_unpacked_ratio)
    for batch in record_batches(parquet, file, name, [field, metadata] if metadata else [field]):
        texts = batch.column(field).cast(pa.large_binary()).to_pylist()
        labels = batch.column(metadata).to_pylist() if metadata else [None] * len(texts)
        for text, label in zip(texts, labels, strict=True):
            counts.lines += 1
            unpacked.add(len(text or b"") + 1)
            fault, chars = text_reason(text, corpus.max_line_bytes)
            if fault:
                counts.quarantine(counts.lines, fault, text or b"")
                continue
            counts.documents += 1
            yield Document(text, chars, counts.lines, labels_of(label))


def record_batches(
    parquet: pq.ParquetFile, file: BinaryIO, name: str, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yields all rows in batches whose size depends on the pages, with all columns unless `columns` is set.

    `file` is a second handle on the file that `parquet` reads.
    """
    wanted = columns or parquet.schema_arrow.names
    groups = row_groups(file, name)
    if [len(group) for group in groups] != [parquet.metadata.num_columns] * parquet.metadata.num_row_groups:
        raise FatalError(f"{name} is damaged: its footer contradicts itself; download it again", name)
    for number, group in enumerate(groups):
        rows = batch_rows(group, parquet.schema, file, name, wanted)
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
