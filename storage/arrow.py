"""Arrow files: the schemas, one writer, one reader. Every file opens as a Hugging Face dataset too.

from datasets import load_dataset
load_dataset("arrow", data_files="…/blocks.arrow")
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from storage.errors import FatalError

TEXT = pa.schema([("text", pa.large_string()), ("line", pa.int64())])
"""One document a row; `line` is the first line of it in its source (1-based)."""

WIDE_VOCABULARY = 65_536
"""From so many pieces on, a token id needs four bytes."""


def blocks_schema(length: int, vocabulary_size: int) -> pa.Schema:
    """Token ids as one fixed-size list of `length` a row, and how many of them are not padding."""
    token = pa.uint32() if vocabulary_size >= WIDE_VOCABULARY else pa.uint16()
    return pa.schema([("input_ids", pa.list_(token, length)), ("length", pa.int32())])


TARGETS = pa.schema([("digest", pa.binary(8)), ("positions", pa.int32()), ("payload", pa.large_binary())])
"""One block a row: digest of the teacher's input, number of positions kept, `positions` encoded vectors end to end."""


class ArrowWriter:
    """Writes record batches into an Arrow IPC file, so that memory is bounded by one batch.

    Use as a context manager. `metadata` goes into the file's schema (strings only).
    """

    def __init__(self, path: Path, schema: pa.Schema, metadata: Mapping[str, str] | None = None) -> None:
        self.schema = schema.with_metadata(dict(metadata)) if metadata else schema
        self.rows = 0
        self._file = pa.OSFile(os.fspath(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self.schema)

    def write(self, columns: Mapping[str, Sequence[Any] | pa.Array]) -> None:
        """Appends one record batch; `columns` maps every field of the schema to its values."""
        arrays = [
            value if isinstance(value, pa.Array) else pa.array(value, type=field.type)
            for field in self.schema
            for value in [columns[field.name]]
        ]
        batch = pa.record_batch(arrays, schema=self.schema)
        self._writer.write_batch(batch)
        self.rows += batch.num_rows

    def close(self) -> None:
        """Writes the footer; without it the file does not open."""
        self._writer.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_arrow(path: str | os.PathLike[str]) -> pa.ipc.RecordBatchFileReader:
    """Memory-maps an Arrow IPC file. FatalError if it is not one or is cut short."""
    try:
        return pa.ipc.open_file(pa.memory_map(os.fspath(path), "r"))
    except (pa.ArrowInvalid, OSError) as error:
        raise FatalError(f"{path} is not a whole Arrow file ({error}); run `distil verify`", os.fspath(path)) from error


def read_table(path: str | os.PathLike[str]) -> pa.Table:
    """The whole file as a memory-mapped table (no copy until a column is touched)."""
    return open_arrow(path).read_all()


def metadata_of(schema: pa.Schema) -> dict[str, str]:
    """The file's own metadata as strings."""
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
