"""Provides advisory file locks for the processes of one machine; the only module that calls `fcntl.flock`.

    with acquire(home / "run" / "prefect.lock"):        # waits until the lock is free
        ...
    lock = try_acquire(home / "run" / "up.lock")        # None if another process holds it
    reader = acquire(folder / ".use", shared=True)      # many shared holders or one exclusive holder

The kernel releases a lock when its holder ends, even after SIGKILL, so a leftover lock file is harmless and needs no
cleanup. A lock belongs to one open file: a second `acquire` in the same process waits too, and the lock of a
parent that forks is released only when both the parent and the child have closed the file.
"""

import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Self

from storage.errors import RetryableError

_ATTEMPTS = 20
"""Number of times that the lock file may be deleted while it is being locked before an error is raised."""


class FileLock:
    """An acquired lock on the file `path`.

    It ends with `release`, at the end of a `with` block, when this object is deleted, or with the process.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Releases the lock. A second call has no effect."""
        self._close()

    def touch(self) -> None:
        """Sets the modification time of the file to the current time."""
        os.utime(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def acquire(path: Path, *, shared: bool = False) -> FileLock:
    """Waits for the lock on `path`. Creates the file and its folder if they do not exist.

    A shared lock excludes only exclusive locks. Raises RetryableError if the file is deleted repeatedly.
    """
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):  # the folder was deleted before the file was opened
            if lock := _lock_once(path, os.O_CREAT, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                return lock
    raise _deleted_too_often(path)


def try_acquire(path: Path, *, create: bool = True) -> FileLock | None:
    """Acquires the exclusive lock on `path` without waiting. Returns None if the lock is held elsewhere.

    If the file does not exist, creates it and its folder, or returns None if `create` is False.
    Raises RetryableError if the file is deleted repeatedly.
    """
    for _ in range(_ATTEMPTS):
        try:
            if lock := _lock_once(path, os.O_CREAT if create else 0, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return lock
        except BlockingIOError:
            return None
        except FileNotFoundError:
            if not create:
                return None
    raise _deleted_too_often(path)


def _lock_once(path: Path, flags: int, operation: int) -> FileLock | None:
    """Opens and locks the file. Returns None if it was deleted or replaced meanwhile: its lock would do nothing."""
    if flags & os.O_CREAT:
        path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | flags, 0o666)
    lock = FileLock(path, descriptor)
    try:
        fcntl.flock(descriptor, operation)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return lock
    except FileNotFoundError:
        pass
    except BaseException:
        lock.release()
        raise
    lock.release()
    return None


def _deleted_too_often(path: Path) -> RetryableError:
    return RetryableError(f"{path} was deleted repeatedly while it was being locked; try again", str(path))
