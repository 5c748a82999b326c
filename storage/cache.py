"""A bounded folder of local copies of a remote store's files, shared by all processes of this machine.

    cache = Cache(Path(".distil/cache"), limit=50_000_000_000)
    pinned = cache.pin("ab12/data/blocks/KEY/CONTENT", receipt.files, fetch)    # copies the missing files
    pinned.folder / "blocks.arrow"                                              # exists as long as `pinned` does

Least recently used folders are evicted first; pinned folders never are: a reader holds a shared lock on a file in the
folder, which the kernel releases if the process dies. One process copies a folder while the others wait for it. The
cache may be deleted at any moment: files that are mapped into memory stay readable, the rest is copied again.
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
"""Locked by the readers of a folder (shared) and by its eviction (exclusive); its mtime is the time of the last use."""

_FETCH = ".fetch"
"""Locked by the process that copies files into the folder."""

_ATTEMPTS = 20


class PinnedFolder:
    """The local folder of one artifact; it is not evicted before `release` is called or this object is deleted."""

    def __init__(self, folder: Path, lock: FileLock | None = None) -> None:
        self.folder = folder
        self._lock = lock

    def release(self) -> None:
        """Lets the folder be evicted; a second call does nothing."""
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
    """Copies under `folder`, up to `limit` bytes; pinned folders may exceed the limit, permanent ones do not count."""

    def __init__(self, folder: Path, limit: int = DEFAULT_CACHE_BYTES) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._unused = 0  # bytes that this process may add before it measures the cache again

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.folder, self.limit)

    def pin(
        self, name: str, files: Sequence[DataFile], fetch: Callable[[str, Path], None], *, permanent: bool = False
    ) -> PinnedFolder:
        """The folder `name` with all these files; `fetch(file, path)` copies those that are missing.

        A `permanent` folder is neither evicted nor counted. DamagedError: a copy has another size than `files` say.
        FatalError: the disk is full. Errors of `fetch` pass through.
        """
        folder = self.folder / name
        for _ in range(_ATTEMPTS):
            with self.disk_errors():
                pinned = _pin(folder, permanent)
                missing = [file for file in files if not _has_size(folder / file.name, file.size)]
                if not missing:
                    return pinned
                self.evict_for(sum(file.size for file in missing))
                with suppress(FileNotFoundError), acquire(folder / _FETCH):  # the cache was deleted: try again
                    for file in missing:
                        if not _has_size(folder / file.name, file.size):
                            _copy(folder, file, fetch)
        raise RetryableError(f"the cache {self.folder} is deleted faster than it is filled")

    def adopt(self, name: str, folder: Path, files: Sequence[DataFile], *, permanent: bool = False) -> None:
        """Moves files that were just uploaded from `folder` into the cache: they are likely to be read next."""
        size = sum(file.size for file in files)
        if size > self.limit:
            return
        self.evict_for(size)
        # After an error the files are copied from the store when they are read.
        with suppress(OSError, RetryableError), _pin(self.folder / name, permanent) as target, acquire(target / _FETCH):
            for file in files:
                (target / file.name).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(folder / file.name, target / file.name)

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """FatalError that names the cache if its disk is full or read-only."""
        with writing(f"the cache {self.folder}", ", or lower run.cache_bytes"):
            yield

    def drop(self, name: str) -> None:
        """Deletes a folder unless it is pinned or permanent."""
        _evict(self.folder / name)

    def evict_for(self, size: int) -> None:
        """Evicts least recently used folders until `size` more bytes fit the limit or all that remain are pinned."""
        with self._lock:
            self._unused -= size
            if self._unused >= 0:
                return
            # At most 1 % of the limit is added between two measurements, since other processes fill the cache too.
            slack = self.limit // 100
            entries = sorted(self.entries())
            total = sum(entry.size for entry in entries) + size
            if total > self.limit:
                for entry in entries:
                    if total > self.limit - slack and _evict(entry.folder):
                        total -= entry.size
            self._unused = max(0, min(slack, self.limit - total))

    def entries(self) -> Iterator[_Entry]:
        """Every folder that is not permanent: time of its last use, bytes of its files, path."""
        # os.walk, because rglob raises if a folder is deleted meanwhile.
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
                f"{file.name} is gone or has another size in the store than its receipt says ({file.size:,} bytes); "
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
    """Creates the folder if it does not exist, and marks it as used now; a permanent one has no file of that mark."""
    if permanent:
        folder.mkdir(parents=True, exist_ok=True)
        return PinnedFolder(folder)
    lock = acquire(folder / _USE, shared=True)
    lock.touch()
    return PinnedFolder(folder, lock)


def _evict(folder: Path) -> bool:
    """Deletes a folder; False if it is pinned, permanent or gone."""
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
        with suppress(OSError):  # the key has another content in the cache
            folder.parent.rmdir()
    return True
