"""Keeps local copies of a remote store's files in a folder of limited size that all processes of a machine share.

    cache = Cache(Path(".distil/cache"), limit=50_000_000_000)
    pinned = cache.pin("ab12/data/blocks/KEY/CONTENT", receipt.files, fetch)    # copies the missing files
    pinned.folder / "blocks.arrow"                                              # exists as long as `pinned` does

Least recently used folders are evicted first. Pinned folders are never evicted: each reader holds a shared lock on a
file in the folder, and the kernel releases the lock if the process dies. One process copies the files of a folder while
the others wait. The cache may be deleted at any time: memory-mapped files stay readable, and other files are copied
again when they are needed.
"""

import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from storage.artifact import DataFile
from storage.errors import DamagedError, RetryableError
from storage.files.disk import writing
from storage.files.lock import FileLock, acquire, try_acquire

DEFAULT_CACHE_BYTES = 50_000_000_000

_USE = ".use"
"""Lock file that readers of a folder share and eviction locks exclusively; its mtime is the time of the last use."""

_FETCH = ".fetch"
"""Lock file of the process that copies files into the folder."""

_ATTEMPTS = 20


class PinnedFolder:
    """The local folder of one artifact, which is not evicted until `release` is called or this object is deleted."""

    def __init__(self, folder: Path, lock: FileLock | None = None) -> None:
        self.folder = folder
        self._lock = lock

    def release(self) -> None:
        """Allows the eviction of the folder. A second call has no effect."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *error: object) -> None:
        self.release()


class _Entry(NamedTuple):
    used: float
    size: int
    folder: Path


class Cache:
    """The copies in `folder`, up to `limit` bytes. Pinned folders may exceed the limit; permanent ones do not count."""

    def __init__(self, folder: Path, limit: int = DEFAULT_CACHE_BYTES) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._unused = 0  # bytes that this process may add before the next measurement of the cache

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.folder, self.limit)

    def pin(
        self, name: str, files: Sequence[DataFile], fetch: Callable[[str, Path], None], *, permanent: bool = False
    ) -> PinnedFolder:
        """Pins the folder `name` after copying each of `files` that is missing with `fetch(file, path)`.

        A `permanent` folder is never evicted and does not count towards the limit.

        Raises DamagedError if the size of a copy differs from that in `files`, FatalError if the disk is full,
        RetryableError if the cache folder is deleted repeatedly, and all errors of `fetch`.
        """
        folder = self.folder / name
        for _ in range(_ATTEMPTS):
            with self.disk_errors():
                pinned = _pin(folder, permanent)
                missing = [file for file in files if not _has_size(folder / file.name, file.size)]
                if not missing:
                    return pinned
                self.evict_for(sum(file.size for file in missing))
                with suppress(FileNotFoundError), acquire(folder / _FETCH):  # the cache was deleted; try again
                    for file in missing:
                        if not _has_size(folder / file.name, file.size):
                            _copy(folder, file, fetch)
        raise RetryableError(
            f"the cache folder {self.folder} was deleted repeatedly while files were copied into it; "
            "do not delete it during a run"
        )

    def adopt(self, name: str, folder: Path, files: Sequence[DataFile], *, permanent: bool = False) -> None:
        """Moves files that were just uploaded from `folder` into the cache, because they are likely to be read next."""
        size = sum(file.size for file in files)
        if size > self.limit:
            return
        self.evict_for(size)
        # After an error, the next reader copies the files from the store.
        with suppress(OSError, RetryableError), _pin(self.folder / name, permanent) as target, acquire(target / _FETCH):
            for file in files:
                (target / file.name).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(folder / file.name, target / file.name)

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Raises FatalError with the path of the cache if its disk is full or read-only."""
        with writing(f"the cache {self.folder}", ", or lower run.cache_bytes"):
            yield

    def drop(self, name: str) -> None:
        """Deletes a folder unless it is pinned or permanent."""
        _evict(self.folder / name)

    def evict_for(self, size: int) -> None:
        """Evicts least recently used folders until `size` more bytes fit or all remaining folders are pinned."""
        with self._lock:
            self._unused -= size
            if self._unused >= 0:
                return
            # Other processes fill the cache too, so at most 1 % of the limit is added between two measurements.
            slack = self.limit // 100
            entries = sorted(self.entries())
            total = sum(entry.size for entry in entries) + size
            if total > self.limit:
                for entry in entries:
                    if total > self.limit - slack and _evict(entry.folder):
                        total -= entry.size
            self._unused = max(0, min(slack, self.limit - total))

    def entries(self) -> Iterator[_Entry]:
        """Yields the time of last use, the bytes and the path of every folder that is not permanent."""
        # Not rglob, which raises if a folder is deleted meanwhile.
        for parent, _, names in os.walk(self.folder):
            folder = Path(parent)
            if _USE in names:
                with suppress(FileNotFoundError):
                    paths = (Path(inner, name) for inner, _, files in os.walk(folder) for name in files)
                    yield _Entry((folder / _USE).stat().st_mtime, sum(path.stat().st_size for path in paths), folder)


def _copy(folder: Path, file: DataFile, fetch: Callable[[str, Path], None]) -> None:
    """Copies one file under a temporary name and renames it, so that an interrupted copy is never read."""
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".part-{path.name}")
    try:
        fetch(file.name, partial)
        if partial.stat().st_size != file.size:
            raise DamagedError(
                f"the size of {file.name} in the store differs from the receipt ({file.size:,} bytes); "
                "run `distil verify`",
                os.fspath(path),
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _pin(folder: Path, permanent: bool) -> PinnedFolder:
    """Creates the folder if necessary, and locks and touches its .use file; a permanent folder has no such file."""
    if permanent:
        folder.mkdir(parents=True, exist_ok=True)
        return PinnedFolder(folder)
    lock = acquire(folder / _USE, shared=True)
    lock.touch()
    return PinnedFolder(folder, lock)


def _evict(folder: Path) -> bool:
    """Deletes a folder. Returns False if the folder is pinned or permanent or does not exist, else True."""
    lock = try_acquire(folder / _USE, create=False)
    if lock is None:
        return False
    with lock:
        evicted = folder.with_name(f".gone-{uuid.uuid4().hex}")
        try:
            folder.rename(evicted)
        except FileNotFoundError:
            return False
        shutil.rmtree(evicted, ignore_errors=True)
        with suppress(OSError):  # another content of the same key is in the cache
            folder.parent.rmdir()
    return True
