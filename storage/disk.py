"""Files on a local disk, whole or not at all: after a function here returns, a power cut loses nothing.

with writing("the home /data/distil"):      # a full or read-only disk is one sentence
    write_file(path, data)
"""

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import FatalError

FULL = {
    errno.ENOSPC: "is full; make space there or name another one",
    errno.EDQUOT: "is over its quota; make space there or name another one",
    errno.EROFS: "is read-only; make it writable or name another one",
}
"""Of a local disk: what trying again does not change."""


@contextmanager
def writing(where: str, instead: str = "") -> Iterator[None]:
    """FatalError where a disk of this machine is full or read-only; all else belongs to whoever writes inside.

    `where` names it in the sentence, `instead` what else than more space would help.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise FatalError(f"{where} {FULL[error.errno]}{instead} ({error})") from error


def move_files(folder: Path, names: Iterable[str], target: Path) -> None:
    """Renames files of `folder`, given by their names in it, into `target` and forces them to disk."""
    names = list(names)
    for name in names:
        source, final = folder / name, target / name
        _fsync(source)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, final)
    for parent in {(target / name).parent for name in names} | {target, target.parent, target.parent.parent}:
        _fsync(parent)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, then renames it."""
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
