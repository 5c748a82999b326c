"""Splits plain, gzip or zstd files into lines for tasks/corpus/reader.py, with bounded memory.

    for line in split_lines(chunks_of(path, name), max_line_bytes): ...

The compression is detected from the first bytes, not from the name. Files with several gzip members or zstd frames are
read to the end. A file that is truncated or damaged, or unpacks to far more bytes than text does, raises FatalError. At
most one line is in memory; only the first bytes of a line longer than the limit are kept.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from storage.errors import FatalError, RetryableError

CHUNK = 1 << 16
"""Unpacked bytes per read; a chunk stays in the CPU cache while it is split and parsed."""

HEAD_BYTES = 400
"""Bytes that are kept of a line that is too long."""

ENDLESS_FACTOR = 64
"""A line this many times longer than the limit raises FatalError: it is not text, or is a decompression bomb."""

DEFAULT_UNPACKED_RATIO = 200
"""Default limit of unpacked bytes per packed byte. Text reaches 3 to 30; decompression bombs reach far more."""

UNCHECKED_BYTES = 1 << 28
"""Unpacked bytes up to which the ratio is not checked, because a small file of one repeated line is harmless."""

_GZIP = b"\x1f\x8b"

_ZSTD = b"\x28\xb5\x2f\xfd"

_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a first byte 0x50 to 0x5f; pzstd writes such a frame first


class LongLine(NamedTuple):
    """A line that was skipped because of its length: its first bytes and its size in bytes."""

    head: bytes
    size: int


def packing_of(head: bytes) -> str:
    """Returns the compression of a file by its first four bytes: "gzip", "zstd" or ""."""
    if head.startswith(_GZIP):
        return "gzip"
    if head.startswith(_ZSTD) or (head[1:4] == _ZSTD_SKIPPABLE and 0x50 <= head[0] <= 0x5F):
        return "zstd"
    return ""


class UnpackedSizeLimit:
    """Limits the unpacked bytes of a file of `size` bytes to `ratio * size`, but to no less than UNCHECKED_BYTES."""

    def __init__(self, name: str, size: int, ratio: int) -> None:
        self.name, self.size, self.ratio = name, size, ratio
        self.remaining = max(UNCHECKED_BYTES, ratio * size)

    def add(self, unpacked: int) -> None:
        """Counts unpacked bytes. Raises FatalError if their sum exceeds the limit."""
        self.remaining -= unpacked
        if self.remaining < 0:
            raise FatalError(
                f"{self.name} unpacks to more than {self.ratio} times its {self.size:,} bytes, which text never does; "
                "remove it from the corpus folder, or raise corpus.max_unpacked_ratio if you trust it",
                self.name,
            )


def chunks_of(path: Path, name: str, ratio: int = DEFAULT_UNPACKED_RATIO) -> Iterator[bytes]:
    """Yields the unpacked bytes of a local file in chunks of at most CHUNK bytes. Errors cite the file as `name`.

    Arrow streams are used because they raise an error at a truncated frame or member, where the zstandard package ends
    silently, and because they never unpack more bytes than requested.

    Raises FatalError if the file is missing, truncated or damaged, or unpacks to more than `ratio` times its size and
    more than UNCHECKED_BYTES bytes.
    """
    try:
        with pa.OSFile(os.fspath(path), "rb") as file:
            packing = packing_of(file.read(4))
            file.seek(0)
            stream = pa.CompressedInputStream(file, packing) if packing else file
            unpacked = UnpackedSizeLimit(name, file.size(), ratio)
            while chunk := stream.read(CHUNK):
                if packing:
                    unpacked.add(len(chunk))
                yield chunk
    except OSError as error:
        raise reading_error(error, name) from error


def reading_error(error: Exception, name: str) -> FatalError | RetryableError:
    """Returns the error for a failed read: FatalError for a missing, forbidden or damaged file, else RetryableError."""
    if isinstance(error, FileNotFoundError):
        return FatalError(f"{name} no longer exists; restore it, or start a new run without it", name)
    if isinstance(error, PermissionError):
        return FatalError(f"{name} is not readable ({error}); change its permissions", name)
    if isinstance(error, OSError) and error.errno is not None:
        return RetryableError(f"{name} could not be read: {error}", name)
    detail = " ".join(str(error).split())[:200]
    if "runcated" in detail:
        return FatalError(f"{name} is truncated ({detail}); download it again", name)
    return FatalError(f"{name} is damaged or truncated ({detail}); download it again", name)


def split_lines(chunks: Iterable[bytes], limit: int, name: str = "") -> Iterator[bytes | LongLine]:
    """Yields lines in order, without newlines. A line of more than `limit` bytes is yielded as a LongLine.

    Raises FatalError if a line has more than ENDLESS_FACTOR times `limit` bytes.
    """
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        if size <= limit:
            parts.append(first)
        size += len(first)
        if size > limit:
            parts = [b"".join(parts)[:HEAD_BYTES]]
        if not rest:
            if size > ENDLESS_FACTOR * limit:
                raise FatalError(
                    f"{name}: a line does not end after {size:,} bytes, so this is not text; remove the file",
                    name,
                )
            continue
        yield b"".join(parts) if size <= limit else LongLine(parts[0], size)
        last = rest.pop()
        for line in rest:
            yield line if len(line) <= limit else LongLine(line[:HEAD_BYTES], len(line))
        parts, size = [last], len(last)
    if size:
        yield b"".join(parts) if size <= limit else LongLine(parts[0][:HEAD_BYTES], size)
