"""Reads and writes targets files: the teacher's encoded outputs at the positions of one shard's blocks.

    targets = open_targets(store, ref)                # verifies the file's hash, maps it into memory
    check_digests(targets, rows, row_digests(masked.input_ids, lengths))
    payload = targets.payload(rows)                   # uint8 [positions of these rows, P]

A file has one row per block (storage.arrow.TARGETS_SCHEMA). Its metadata contains the key of its artifact and all
parameters of the decoder, calibration included. Reading copies each row once and is thread-safe.

Shapes: R rows (blocks) of a shard, N positions, P bytes per position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.arrow import TARGETS_FILE, ArrowWriter, metadata_of, open_arrow
from storage.artifact import Ref
from storage.cache import PinnedFolder
from storage.errors import FatalError
from storage.store import Store
from tasks.targets.codec import Calibration, Codec

Bytes = npt.NDArray[np.uint8]

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TargetRows:
    """One shard's targets, memory-mapped.

    `counts` int32 [R]: positions stored per block. `digests` uint64 [R]: `row_digests` of the teacher's input.
    `metadata`: the metadata of the file.
    """

    key: str
    label: str
    codec: Codec
    counts: npt.NDArray[np.int32]
    digests: npt.NDArray[np.uint64]
    metadata: Mapping[str, str]
    _batches: tuple[Bytes, ...]
    _batch_of: Int64s
    _start_of: Int64s
    pinned: PinnedFolder | None = None
    """Keeps the local copy of a remote file in the cache while this object is alive."""

    def __len__(self) -> int:
        return len(self.counts)

    def payload(self, rows: npt.NDArray[Any]) -> Bytes:
        """Returns the encoded vectors uint8 [N, P] of the given rows, concatenated in their order."""
        size = self.codec.bytes_per_position
        pieces = [
            self._batches[batch][start : start + count * size]
            for batch, start, count in zip(
                self._batch_of[rows].tolist(), self._start_of[rows].tolist(), self.counts[rows].tolist(), strict=True
            )
        ]
        joined: Bytes = np.concatenate(pieces) if pieces else np.empty(0, np.uint8)
        return joined.reshape(-1, size)


def open_targets(store: Store, ref: Ref) -> TargetRows:
    """Verifies the hash of one shard's targets and opens them.

    FatalError: they are missing, damaged, or belong to a different artifact; the message contains the label of the
    shard.
    """
    pinned = store.pin(store.receipt(ref), check=True)
    return replace(read_targets(pinned.folder / TARGETS_FILE, ref), pinned=pinned)


def read_targets(path: Path, ref: Ref) -> TargetRows:
    """Maps a targets file into memory, committed or not. FatalError: it was not made for `ref`, or is damaged."""
    reader = open_arrow(path)
    metadata = metadata_of(reader.schema)
    if metadata.get("key") != ref.key:
        raise FatalError(
            f"targets {ref.label}: {path} belongs to a different artifact (key {metadata.get('key', 'unknown')[:12]}, "
            f"not {ref.key[:12]}); run `distil verify`, then `distil retry`",
            str(path),
        )
    codec = _codec_of(metadata, path)
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    counts = _joined([batch.column("positions").to_numpy() for batch in batches], np.int32)
    starts = [_offsets(batch.column("payload")) for batch in batches]
    if any(
        (np.diff(offsets) != batch.column("positions").to_numpy() * codec.bytes_per_position).any()
        for offsets, batch in zip(starts, batches, strict=True)
    ):
        raise FatalError(f"targets {ref.label}: the rows of {path} have a wrong size; run `distil verify`", str(path))
    return TargetRows(
        key=ref.key,
        label=ref.label,
        codec=codec,
        counts=counts,
        digests=_joined([_digests(batch.column("digest")) for batch in batches], np.uint64),
        metadata=metadata,
        _batches=tuple(np.frombuffer(batch.column("payload").buffers()[2] or b"", np.uint8) for batch in batches),
        _batch_of=np.repeat(np.arange(len(batches)), [batch.num_rows for batch in batches]),
        _start_of=_joined([offsets[:-1] for offsets in starts], np.int64),
    )


def check_digests(targets: TargetRows, rows: npt.NDArray[Any], digests: Sequence[bytes]) -> None:
    """Compares the stored digests of the teacher's input with `digests`, those of the input rebuilt for these rows.

    FatalError: a digest differs, because the cache is shuffled, shifted, stale or foreign; the message contains the
    label of the shard and the first such row.
    """
    beyond = rows >= len(targets)
    known = np.where(beyond, 0, rows)
    wanted = np.frombuffer(b"".join(digests), "<u8")
    wrong = beyond | (targets.digests[known] != wanted) if len(targets) else np.ones(len(rows), np.bool_)
    if wrong.any():
        row = int(np.asarray(rows)[np.flatnonzero(wrong)[0]])
        raise FatalError(
            f"targets {targets.label}: row {row} was computed from a different input from that of this block and mask "
            "(the cache is shuffled, shifted, stale or foreign); run `distil verify`, then `distil retry`",
            targets.label,
        )


# ---- writing -------------------------------------------------------------------------------------------------


def file_metadata(codec: Codec, ref: Ref, facts: Mapping[str, str]) -> dict[str, str]:
    """Returns a targets file's metadata: the decoder's parameters, the key of its artifact, and informative `facts`."""
    return {
        **facts,
        "key": ref.key,
        "encoding": codec.name,
        "width": str(codec.width),
        "bytes": str(codec.bytes_per_position),
        "vocab": str(codec.vocab_size),
        "top_k": str(codec.top_k),
        "calibration": codec.calibration.to_text() if codec.calibration else "",
    }


def write_rows(writer: ArrowWriter, digests: Sequence[bytes], counts: npt.NDArray[Any], payload: Bytes) -> None:
    """Appends b blocks without copying the payload: `digests` and `counts` [b], payload [sum of counts, P]."""
    ends = np.cumsum(counts, dtype=np.int64) * payload.shape[1]
    offsets = np.concatenate([np.zeros(1, np.int64), ends])
    rows = len(counts)
    writer.write(
        {
            "digest": pa.Array.from_buffers(pa.binary(8), rows, [None, pa.py_buffer(b"".join(digests))]),
            "positions": pa.array(counts.astype(np.int32)),
            "payload": pa.Array.from_buffers(
                pa.large_binary(), rows, [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(payload))]
            ),
        }
    )


# ---- reading -------------------------------------------------------------------------------------------------


def _codec_of(metadata: Mapping[str, str], path: Path) -> Codec:
    try:
        text = metadata["calibration"]
        return Codec(
            metadata["encoding"],
            int(metadata["width"]),
            int(metadata["vocab"]),
            int(metadata["top_k"]),
            Calibration.from_text(text) if text else None,
        )
    except (KeyError, ValueError) as error:
        raise FatalError(
            f"{path} does not have the metadata of a targets file of this version ({error}); run `distil verify`",
            str(path),
        ) from error


def _offsets(column: pa.Array) -> Int64s:
    buffer = column.buffers()[1]
    offsets = np.frombuffer(buffer, np.int64) if buffer else np.zeros(1, np.int64)
    return offsets[column.offset : column.offset + len(column) + 1]


def _digests(column: pa.Array) -> npt.NDArray[np.uint64]:
    return np.frombuffer(column.buffers()[1], "<u8")[column.offset : column.offset + len(column)]


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)
