"""Writes files to a local disk atomically and durably.

    with writing("the home /data/distil"):      # raises FatalError if the disk is full or read-only
        write_file(path, data)

Each step covers one failure:
- Write to a temporary name, then rename: after a crash a file is complete or absent; readers never see a partial file.
- fsync of the file before the rename: after a power failure the new name does not refer to an empty or partial file.
- fsync of the folder after the rename: a power failure does not undo a write after the function has returned.
"""

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import FatalError

DISK_ERRORS = {
    errno.ENOSPC: "is full; free some space or use a different disk",
    errno.EDQUOT: "is over its quota; free some space or use a different disk",
    errno.EROFS: "is read-only; make it writable or use a different disk",
}
"""Error numbers of a local disk that a retry does not fix, with the ends of their messages."""


@contextmanager
def writing(where: str, instead: str = "") -> Iterator[None]:
    """Raises FatalError if the body fails because the disk is full or read-only. Other errors pass through.

    `where` is the name of the disk in the message; `instead` adds a remedy, such as ", or lower run.cache_bytes".
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise FatalError(f"{where} {DISK_ERRORS[error.errno]}{instead} ({error})") from error


def move_files(folder: Path, names: Iterable[str], target: Path) -> None:
    """Moves files from `folder` to `target` on the same file system and flushes them. `names` are relative paths."""
    names = list(names)
    for name in names:
        source, final = folder / name, target / name
        _fsync(source)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, final)
    for parent in {(target / name).parent for name in names} | {target, target.parent, target.parent.parent}:
        _fsync(parent)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file atomically and flushes it. Creates its folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".write-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
