"""Writes and reads the Arrow files of artifacts. Each file can also be opened as a Hugging Face data set.

with ArrowWriter(folder / TEXT_FILE, TEXT_SCHEMA) as writer:
    writer.write({"text": ["Un.", "Deux."], "line": [1, 2]})
open_arrow(folder / TEXT_FILE).read_all()
datasets.load_dataset("arrow", data_files="…/blocks.arrow")
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from storage.errors import FatalError

TEXT_FILE, BLOCKS_FILE, TARGETS_FILE = "text.arrow", "blocks.arrow", "targets.arrow"
"""Names of the single Arrow file in an artifact of kind shard, blocks and targets."""

TEXT_SCHEMA = pa.schema([("text", pa.large_string()), ("line", pa.int64())])
"""One document per row; `line` is the number of its first line in the source (from 1)."""

WIDE_VOCABULARY = 65_536
"""Minimum vocabulary size at which a token id takes four bytes instead of two."""


def blocks_schema(length: int, vocabulary_size: int) -> pa.Schema:
    """Returns the schema of blocks, one per row: `length` input ids, and the number of ids that are not padding."""
    token = pa.uint32() if vocabulary_size >= WIDE_VOCABULARY else pa.uint16()
    return pa.schema([("input_ids", pa.list_(token, length)), ("length", pa.int32())])


TARGETS_SCHEMA = pa.schema([("digest", pa.binary(8)), ("positions", pa.int32()), ("payload", pa.large_binary())])
"""One block per row: digest of the teacher's input, number of stored positions, and their concatenated encodings."""


class ArrowWriter:
    """Context manager that writes an Arrow IPC file and keeps at most one record batch in memory.

    `metadata` (strings only) is stored in the schema of the file.
    """

    def __init__(self, path: Path, schema: pa.Schema, metadata: Mapping[str, str] | None = None) -> None:
        self.schema = schema.with_metadata(dict(metadata)) if metadata else schema
        self.rows = 0
        self._file = pa.OSFile(os.fspath(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self.schema)

    def write(self, columns: Mapping[str, Sequence[Any] | pa.Array]) -> None:
        """Appends one record batch. `columns` maps every field of the schema to its values."""
        arrays = [
            value if isinstance(value, pa.Array) else pa.array(value, type=field.type)
            for field in self.schema
            for value in [columns[field.name]]
        ]
        batch = pa.record_batch(arrays, schema=self.schema)
        self._writer.write_batch(batch)
        self.rows += batch.num_rows

    def close(self) -> None:
        """Writes the footer, without which the file cannot be opened."""
        self._writer.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_arrow(path: str | os.PathLike[str]) -> pa.ipc.RecordBatchFileReader:
    """Memory-maps an Arrow IPC file. Raises FatalError if the file is truncated or not an Arrow file."""
    try:
        return pa.ipc.open_file(pa.memory_map(os.fspath(path), "r"))
    except (pa.ArrowInvalid, OSError) as error:
        raise FatalError(
            f"{path} is not a complete Arrow file ({error}); run `distil verify`", os.fspath(path)
        ) from error


def metadata_of(schema: pa.Schema) -> dict[str, str]:
    """Returns the metadata of an Arrow schema as strings."""
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
