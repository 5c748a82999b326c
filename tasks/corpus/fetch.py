"""Copies a source to local disk and hashes it, or reads its first bytes, for shard.py and tasks/plan/sample.py.

with fetched(source, folder) as (path, content): ...
head = read_head(source, 1 << 20)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from storage.errors import FatalError, RetryableError
from storage.files.filesystem import open_url, translate_errors
from storage.fingerprint import CHUNK, sha256_file
from tasks.corpus.formats.lines import reading_error
from tasks.corpus.snapshot import Source


@contextmanager
def fetched(source: Source, folder: Path) -> Iterator[tuple[Path, str]]:
    """Yields the local path and the hex sha256 of a source. A remote source is copied and hashed in one pass.

    Raises FatalError if the source is empty or missing, or its hash differs from the checksum file. Raises
    RetryableError if the source changes during the read, or the server does not respond.
    """
    before = _size_and_mtime(source)
    if not source.size:
        raise FatalError(f"{source.name} is empty; download it again or remove it from the corpus folder", source.name)
    path, content = (Path(source.url), _hash(source)) if source.is_local else _copy(source, folder)
    if source.sha256 and content != source.sha256:
        raise FatalError(
            f"{source.name}: its sha256 is {content[:12]}…, but the checksum file says {source.sha256[:12]}…; "
            "download the file again or correct the checksum file",
            source.name,
        )
    yield path, content
    if _size_and_mtime(source) != before:
        raise RetryableError(f"{source.name} changed while it was being read; try again", source.name)
    if not source.is_local:
        path.unlink()


def read_head(source: Source, size: int) -> bytes:
    """Returns the first `size` bytes of a source, or all of a shorter one.

    Raises the same errors as `fetched`, except that no checksum is verified.
    """
    parts: list[bytes] = []
    received = 0
    for chunk in _download(source):
        parts.append(chunk)
        received += len(chunk)
        if received >= size:
            break
    return b"".join(parts)[:size]


def _size_and_mtime(source: Source) -> tuple[int, int]:
    """Returns the size and the mtime in ns of a local file; (0, 0) for a remote source, which is copied in full."""
    if not source.is_local:
        return 0, 0
    try:
        stat = os.stat(source.url)
    except OSError as error:
        raise reading_error(error, source.name) from error
    return stat.st_size, stat.st_mtime_ns


def _hash(source: Source) -> str:
    try:
        return sha256_file(source.url)
    except OSError as error:
        raise reading_error(error, source.name) from error


def _copy(source: Source, folder: Path) -> tuple[Path, str]:
    """Copies a remote file into `folder` and hashes it in the same pass."""
    digest = sha256()
    path = folder / f"{source.label}-{len(list(folder.iterdir()))}"
    with path.open("wb") as out:
        for chunk in _download(source):
            digest.update(chunk)
            out.write(chunk)
            if out.tell() > source.size:  # an endless response would fill the disk
                raise RetryableError(
                    f"{source.name} has more than the {source.size:,} bytes that were listed; try again", source.name
                )
    if path.stat().st_size != source.size:
        received = path.stat().st_size
        raise RetryableError(
            f"only {received:,} of {source.size:,} bytes of {source.name} were received; try again", source.name
        )
    return path, digest.hexdigest()


def _download(source: Source) -> Iterator[bytes]:
    try:
        with translate_errors(source.url):
            fs, path = open_url(source.url)
            with fs.open(path, "rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk
    except FileNotFoundError as error:
        raise reading_error(error, source.name) from error
