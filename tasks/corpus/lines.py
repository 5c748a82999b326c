"""Lines out of packed or plain files, with bounded memory. Called by tasks/corpus/reader.py.

    for line in split_lines(chunks_of(path, name), max_line_bytes): ...

The packing is recognised by the first bytes, not by the name. Files of several gzip members or zstd frames are read
to their end; one that is cut short or damaged is a FatalError, and so is one that unpacks to far more than text does.
Nothing longer than a line is ever held, and a line that is too long is not held either: only its beginning is kept
while the rest is skipped.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from storage.errors import FatalError, RetryableError

CHUNK = 1 << 16
"""Unpacked bytes read at once: stays in the processor's cache while it is split and parsed."""

HEAD = 400
"""Bytes kept of a line that is too long."""

ENDLESS = 64
"""A line this many times longer than allowed ends the source: such a file is no text, or packed to do harm."""

RATIO = 200
"""A source that unpacks to more than so many times its size was made to do harm (text: 3 to 30 times); see HARMLESS."""

HARMLESS = 1 << 28
"""Unpacked bytes up to which no ratio is looked at: even a small file of one repeated line is no danger there."""

_GZIP = b"\x1f\x8b"

_ZSTD = b"\x28\xb5\x2f\xfd"

_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a first byte 50 to 5f; pzstd writes such a frame first


class LongLine(NamedTuple):
    """A line that was skipped: its first bytes and its length in bytes."""

    head: bytes
    size: int


def packing_of(head: bytes) -> str:
    """`gzip`, `zstd` or empty, by the first four bytes of a file."""
    if head.startswith(_GZIP):
        return "gzip"
    if head.startswith(_ZSTD) or (head[1:4] == _ZSTD_SKIPPABLE and 0x50 <= head[0] <= 0x5F):
        return "zstd"
    return ""


class UnpackedSize:
    """Watches how much comes out of a file of `size` bytes: FatalError beyond `ratio` times that (and HARMLESS)."""

    def __init__(self, name: str, size: int, ratio: int) -> None:
        self.name, self.size, self.ratio = name, size, ratio
        self.left = max(HARMLESS, ratio * size)

    def add(self, unpacked: int) -> None:
        """Counts bytes that came out."""
        self.left -= unpacked
        if self.left < 0:
            raise FatalError(
                f"{self.name} unpacks to more than {self.ratio} times its {self.size:,} bytes, as no text does; "
                "leave it out, or raise corpus.max_unpacked_ratio if it is meant to",
                self.name,
            )


def chunks_of(path: Path, name: str, ratio: int = RATIO) -> Iterator[bytes]:
    """The unpacked bytes of a local file in pieces of at most CHUNK; `name` is what errors call it.

    FatalError: cut short, damaged, or a packed file that unpacks to more than `ratio` times its size (and HARMLESS).
    Arrow's streams do the unpacking because they raise at a frame or member that is cut short, where zstandard's own
    reader just ends, and because they never unpack more than they are asked for.
    """
    try:
        with pa.OSFile(os.fspath(path), "rb") as file:
            packing = packing_of(file.read(4))
            file.seek(0)
            stream = pa.CompressedInputStream(file, packing) if packing else file
            growth = UnpackedSize(name, file.size(), ratio)
            while chunk := stream.read(CHUNK):
                if packing:
                    growth.add(len(chunk))
                yield chunk
    except OSError as error:
        raise reading_error(error, name) from error


def reading_error(error: Exception, name: str) -> FatalError | RetryableError:
    """What a failed read means: an archive that is cut short or damaged, a file that is gone, or passing trouble."""
    if isinstance(error, FileNotFoundError):
        return FatalError(f"{name} is gone; put it back or take a new snapshot", name)
    if isinstance(error, PermissionError):
        return FatalError(f"{name} may not be read: {error}; change its permissions", name)
    if isinstance(error, OSError) and error.errno is not None:
        return RetryableError(f"{name} could not be read: {error}", name)
    what = " ".join(str(error).split())[:200]
    if "runcated" in what:
        return FatalError(f"{name} is cut short ({what}); fetch it again", name)
    return FatalError(f"{name} is damaged or cut short ({what}); fetch it again", name)


def split_lines(chunks: Iterable[bytes], limit: int, name: str = "") -> Iterator[bytes | LongLine]:
    """Lines without their newline, in order; one of more than `limit` bytes as a LongLine.

    FatalError at a line of more than ENDLESS times `limit`.
    """
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        if size <= limit:
            parts.append(first)
        size += len(first)
        if size > limit:
            parts = [b"".join(parts)[:HEAD]]
        if not rest:
            if size > ENDLESS * limit:
                raise FatalError(f"{name}: a line does not end after {size:,} bytes; this is no text file", name)
            continue
        yield b"".join(parts) if size <= limit else LongLine(parts[0], size)
        last = rest.pop()
        for line in rest:
            yield line if len(line) <= limit else LongLine(line[:HEAD], len(line))
        parts, size = [last], len(last)
    if size:
        yield b"".join(parts) if size <= limit else LongLine(parts[0][:HEAD], size)
