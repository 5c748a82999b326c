"""Advisory file locks between processes of one machine; the only module that calls `fcntl.flock`.

    with acquire(home / "run" / "prefect.lock"):        # waits until the lock is free
        ...
    lock = try_acquire(home / "run" / "up.lock")        # None if another process holds it
    reader = acquire(folder / ".use", shared=True)      # any number of readers, or one exclusive holder

The kernel releases a lock when its holder ends, even after SIGKILL, so a stale lock file blocks no process and needs no
cleanup. A lock belongs to one open file: a second `acquire` in the same process waits too, and a forked child keeps the
lock of its parent until both have closed it.
"""

import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Self

from storage.errors import RetryableError

_ATTEMPTS = 20
"""A file that is deleted that often while it is being locked is an error."""


class FileLock:
    """A held lock on the file `path`.

    Ends with `release`, with a `with` block, when this object is deleted, or with the process.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Releases the lock; a second call does nothing."""
        self._close()

    def touch(self) -> None:
        """Sets the file's modification time to now."""
        os.utime(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def acquire(path: Path, *, shared: bool = False) -> FileLock:
    """Waits for the lock on `path`; creates the file and its folder if they do not exist.

    A shared lock excludes only exclusive ones. RetryableError if the file is deleted again and again.
    """
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):  # the folder was deleted before the file was opened
            if lock := _lock_once(path, os.O_CREAT, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                return lock
    raise _deleted_too_often(path)


def try_acquire(path: Path, *, create: bool = True) -> FileLock | None:
    """The exclusive lock on `path`, or None at once if it is held elsewhere.

    Creates the file and its folder if they do not exist, or returns None for a missing file if not `create`.
    RetryableError if the file is deleted again and again.
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
    """Opens and locks the file. None if it was deleted or replaced meanwhile: that lock would protect nothing."""
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
    return RetryableError(f"{path} is deleted as often as it is created; try again", str(path))
