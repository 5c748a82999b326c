"""Arrow files read back, open as Hugging Face datasets, and are refused if truncated."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import load_dataset

from storage.arrow import (
    BLOCKS_FILE,
    TARGETS_FILE,
    TARGETS_SCHEMA,
    TEXT_FILE,
    TEXT_SCHEMA,
    ArrowWriter,
    blocks_schema,
    metadata_of,
    open_arrow,
)
from storage.errors import FatalError


def test_batches_read_back_with_metadata(tmp_path: Path) -> None:
    path = tmp_path / TEXT_FILE
    with ArrowWriter(path, TEXT_SCHEMA, {"encoding": "int8"}) as writer:
        writer.write({"text": ["é", "b"], "line": [1, 2]})
        writer.write({"text": ["c"], "line": [9]})
        assert writer.rows == 3
    assert open_arrow(path).read_all().to_pydict() == {"text": ["é", "b", "c"], "line": [1, 2, 9]}
    assert metadata_of(open_arrow(path).schema) == {"encoding": "int8"}


@pytest.mark.parametrize(("size", "kind"), [(65_535, pa.uint16()), (65_536, pa.uint32())])
def test_token_ids_fit_the_vocabulary(size: int, kind: pa.DataType) -> None:
    assert blocks_schema(8, size).field("input_ids").type.value_type == kind


def test_blocks_and_targets_open_as_datasets(tmp_path: Path) -> None:
    ids = np.arange(16, dtype=np.uint16)
    with ArrowWriter(tmp_path / BLOCKS_FILE, blocks_schema(8, 1000)) as writer:
        writer.write({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids), 8), "length": [8, 5]})
    with ArrowWriter(tmp_path / TARGETS_FILE, TARGETS_SCHEMA) as writer:
        writer.write({"digest": [b"12345678"], "positions": [2], "payload": [b"xyz"]})
    blocks = load_dataset("arrow", data_files=str(tmp_path / BLOCKS_FILE), cache_dir=str(tmp_path / "c"))["train"]
    targets = load_dataset("arrow", data_files=str(tmp_path / TARGETS_FILE), cache_dir=str(tmp_path / "c"))["train"]
    assert blocks[1] == {"input_ids": list(range(8, 16)), "length": 5}
    assert targets[0]["positions"] == 2


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / TEXT_FILE
    with ArrowWriter(path, TEXT_SCHEMA) as writer:
        writer.write({"text": ["a" * 1000], "line": [1]})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FatalError, match=r"text\.arrow is not a complete Arrow file"):
        open_arrow(path)
