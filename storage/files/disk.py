"""Atomic and durable writes to a local disk.

    with writing("the home /data/distil"):      # a full or read-only disk becomes a FatalError
        write_file(path, data)

Failures that each step covers:
- temporary name, then rename: after a crash a file is complete or absent, and a reader never sees a part of it.
- fsync of the file before the rename: after a power cut the new name does not refer to an empty or partial file.
- fsync of the folder after the rename: a power cut does not undo a write that a function here has returned from.
"""

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import FatalError

DISK_ERRORS = {
    errno.ENOSPC: "is full; make space there or name another one",
    errno.EDQUOT: "is over its quota; make space there or name another one",
    errno.EROFS: "is read-only; make it writable or name another one",
}
"""Errors of a local disk that a retry does not fix, and their remedy."""


@contextmanager
def writing(where: str, instead: str = "") -> Iterator[None]:
    """Raises FatalError if the body finds its disk full or read-only; other errors pass through.

    `where` names the disk in the message, `instead` is another remedy, such as ", or lower run.cache_bytes".
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise FatalError(f"{where} {DISK_ERRORS[error.errno]}{instead} ({error})") from error


def move_files(folder: Path, names: Iterable[str], target: Path) -> None:
    """Moves files of `folder`, given by relative names, into `target` on the same file system, and flushes them."""
    names = list(names)
    for name in names:
        source, final = folder / name, target / name
        _fsync(source)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, final)
    for parent in {(target / name).parent for name in names} | {target, target.parent, target.parent.parent}:
        _fsync(parent)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file atomically and flushes it; creates its folder if it does not exist."""
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
