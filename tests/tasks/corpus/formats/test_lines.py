"""Lines of packed files: none is lost, memory is bounded, and truncated files fail."""

import gzip
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import FatalError, RetryableError
from tasks.corpus.formats.lines import ENDLESS_FACTOR, HEAD_BYTES, LongLine, chunks_of, reading_error, split_lines

NOISE = random.Random(0).randbytes(40_000)


def pack(data: bytes, kind: str) -> bytes:
    if kind == "zst":
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    if kind == "bare zst":
        return zstandard.ZstdCompressor(write_checksum=False, write_content_size=False).compress(data)
    return gzip.compress(data, mtime=0)


def unpack(path: Path) -> bytes:
    return b"".join(chunks_of(path, path.name))


@given(
    data=st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"\xc3\xa9", b"x" * 9])).map(b"".join),
    cuts=st.lists(st.integers(1, 7)),
    limit=st.integers(1, 20),
)
def test_lines_do_not_depend_on_the_chunk_boundaries(data: bytes, cuts: list[int], limit: int) -> None:
    chunks, rest = [], data
    for cut in cuts:
        chunks.append(rest[:cut])
        rest = rest[cut:]
    chunks = [chunk for chunk in (*chunks, rest) if chunk]
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    try:
        found = list(split_lines(chunks, limit))
    except FatalError:
        assert max(map(len, expected)) > ENDLESS_FACTOR * limit
        return
    assert len(found) == len(expected)
    for line, wanted in zip(found, expected, strict=True):
        if len(wanted) <= limit:
            assert line == wanted
        else:
            assert isinstance(line, LongLine)
            assert line.size == len(wanted)
            assert line.head
            assert wanted.startswith(line.head)


@pytest.mark.parametrize("kind", ["gz", "zst", "bare zst"])
def test_several_gzip_members_or_zstd_frames_are_one_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(pack(b"one\n", kind) + pack(b"", kind) + pack(NOISE, kind))
    assert unpack(path) == b"one\n" + NOISE


def test_skippable_zstd_frame_at_the_start_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + pack(b"text\n", "zst"))
    assert unpack(path) == b"text\n"


@pytest.mark.parametrize("kind", ["gz", "zst", "bare zst"])
@pytest.mark.parametrize("before", [b"", b"an earlier frame\n"])
def test_file_truncated_at_any_byte_fails_with_its_name(tmp_path: Path, kind: str, before: bytes) -> None:
    first = pack(before, kind) if before else b""
    complete = pack(NOISE, kind)
    path = tmp_path / "part_1"
    for cut in [*range(4, 30, 5), *range(30, len(complete), 4001), *range(len(complete) - 9, len(complete))]:
        path.write_bytes(first + complete[:cut])
        with pytest.raises(FatalError, match=r"part_1.*truncated"):
            unpack(path)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_damaged_file_fails(tmp_path: Path, kind: str) -> None:
    data = bytearray(pack(NOISE, kind))
    data[len(data) // 2] ^= 1
    path = tmp_path / "part_1"
    path.write_bytes(data)
    with pytest.raises(FatalError, match="part_1 is damaged"):
        unpack(path)


def test_packed_line_of_50_mb_is_skipped_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(pack(b'{"a": "' + bytes(50_000_000) + b'"}\nnext\n', "zst"))
    lines = list(split_lines(chunks_of(path, "x"), 1_000_000))
    assert lines[1:] == [b"next"]
    assert isinstance(lines[0], LongLine)
    assert lines[0].size == 50_000_009
    assert len(lines[0].head) == HEAD_BYTES


def test_line_without_end_fails() -> None:
    def zeros() -> object:
        while True:
            yield bytes(100_000)

    with pytest.raises(FatalError, match="bomb: a line does not end"):
        list(split_lines(zeros(), 10_000, "bomb"))  # type: ignore[arg-type]


def test_disk_error_is_retryable_and_missing_file_is_fatal(tmp_path: Path) -> None:
    with pytest.raises(FatalError, match="part_9 no longer exists"):
        list(chunks_of(tmp_path / "nothing", "part_9"))
    assert isinstance(reading_error(OSError(5, "Input/output error"), "part_9"), RetryableError)
