"""A bounded folder of copies: what a remote store holds, kept on this machine while it is read.

    cache = Cache(Path(".distil/cache"), limit=50_000_000_000)
    held = cache.pin("ab12/data/blocks/KEY/CONTENT", receipt.files, fetch)   # copies what is missing
    held.folder / "blocks.arrow"                                              # stays while `held` lives

What was used longest ago goes first, and never what somebody holds: a holder has a shared lock on a file in the folder,
which ends with its process at the latest. Several processes share one cache, and one of them copies what all of them
need. The whole of it may be deleted at any moment: what is mapped into memory stays there, the rest is copied again.
"""

import fcntl
import os
import shutil
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from storage.artifact import DataFile
from storage.disk import writing
from storage.errors import DamagedError, RetryableError

LIMIT = 50_000_000_000
"""Bytes, where nobody says otherwise."""

_USE = ".use"
"""Locked by who holds a folder (shared) or deletes it; its time of change is when the folder was last used."""

_FETCH = ".fetch"
"""Locked by who copies files into a folder."""

_TRIES = 20


class PinnedFolder:
    """A local folder of one artifact, which nobody evicts until `release` is called or this object is let go of."""

    def __init__(self, folder: Path, descriptor: int | None = None) -> None:
        self.folder = folder
        self.release: Callable[[], object] = (
            (lambda: None) if descriptor is None else weakref.finalize(self, os.close, descriptor)
        )

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *error: object) -> None:
        self.release()


class _Entry(NamedTuple):
    used: float
    size: int
    folder: Path


class Cache:
    """`limit` bounds, in bytes, what is kept beyond that which is in use at the same time."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._room = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.folder, self.limit)

    def pin(
        self, name: str, files: Sequence[DataFile], fetch: Callable[[str, Path], None], *, keep: bool = False
    ) -> PinnedFolder:
        """The folder `name` with all these files, copied by `fetch(file, path)` as far as they are not there.

        With `keep` it is never evicted, nor counted. DamagedError: a copy has another size than `files` say.
        FatalError: the disk is full. Whatever `fetch` raises.
        """
        folder = self.folder / name
        for _ in range(_TRIES):
            with self.filling():
                held = _keep(folder) if keep else _share(folder)
                missing = [file for file in files if not _is_whole(folder / file.name, file.size)]
                if not missing:
                    return held
                self.make_room(sum(file.size for file in missing))
                with suppress(FileNotFoundError), _alone(folder):  # somebody deleted the cache meanwhile: once more
                    for file in missing:
                        if not _is_whole(folder / file.name, file.size):
                            _copy(folder, file, fetch)
        raise RetryableError(f"the cache {self.folder} is deleted faster than it is filled")

    def adopt(self, name: str, folder: Path, files: Sequence[DataFile], *, keep: bool = False) -> None:
        """Moves files that were just written to the store here, since they are likely to be read next."""
        size = sum(file.size for file in files)
        if size > self.limit:
            return
        self.make_room(size)
        with suppress(OSError):  # else they are copied when they are needed
            here = _keep(self.folder / name) if keep else _share(self.folder / name)
            with here as target, _alone(target):
                for file in files:
                    (target / file.name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(folder / file.name, target / file.name)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """FatalError that names the cache if its disk is full inside."""
        with writing(f"the cache {self.folder}", ", or lower run.cache_bytes"):
            yield

    def drop(self, name: str) -> None:
        """Deletes a folder, unless it is in use."""
        _evict(self.folder / name)

    def make_room(self, size: int) -> None:
        """Deletes what was used longest ago until `size` bytes more are within the limit, or all the rest is in use."""
        with self._lock:
            self._room -= size
            if self._room >= 0:
                return
            # Others fill it too, so it is looked at again long before all that is free now is used.
            slack = self.limit // 100
            entries = sorted(self.entries())
            total = sum(entry.size for entry in entries) + size
            if total > self.limit:
                for entry in entries:
                    if total > self.limit - slack and _evict(entry.folder):
                        total -= entry.size
            self._room = max(0, min(slack, self.limit - total))

    def entries(self) -> Iterator[_Entry]:
        """Every folder that may be evicted, as it is now: when it was last used, bytes of its files, path."""
        # os.walk and not rglob, which stumbles over folders that are deleted meanwhile.
        for place, _, names in os.walk(self.folder):
            folder = Path(place)
            if _USE in names:
                with suppress(FileNotFoundError):
                    below = (Path(inner, name) for inner, _, files in os.walk(folder) for name in files)
                    yield _Entry((folder / _USE).stat().st_mtime, sum(path.stat().st_size for path in below), folder)


def _copy(folder: Path, file: DataFile, fetch: Callable[[str, Path], None]) -> None:
    """One file under a temporary name first, so that a cut-off copy is never taken for whole."""
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".part-{path.name}")
    try:
        fetch(file.name, fresh)
        if fresh.stat().st_size != file.size:
            raise DamagedError(
                f"{file.name} is gone or has another size in the store than its receipt says ({file.size:,} bytes); "
                "run `distil verify`",
                os.fspath(path),
            )
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _is_whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


# ---- locks -------------------------------------------------------------------------------------------------


def _share(folder: Path) -> PinnedFolder:
    """Marks a folder, which is made if need be, as used now and in use."""
    while True:
        with suppress(FileNotFoundError):  # deleted between these lines: once more
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / _USE, os.O_RDWR | os.O_CREAT, 0o600)
            held = PinnedFolder(folder, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_same(descriptor, folder / _USE):
                os.utime(descriptor)
                return held


def _keep(folder: Path) -> PinnedFolder:
    """Makes a folder that nobody evicts."""
    folder.mkdir(parents=True, exist_ok=True)
    return PinnedFolder(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until nobody else copies files into the folder."""
    descriptor = os.open(folder / _FETCH, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _evict(folder: Path) -> bool:
    """Deletes a folder; False if somebody holds it, or it is gone already."""
    try:
        descriptor = os.open(folder / _USE, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_same(descriptor, folder / _USE):
            return False
        doomed = folder.with_name(f".gone-{uuid.uuid4().hex}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        with suppress(OSError):  # other bytes of the same key lie there
            folder.parent.rmdir()
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(descriptor)
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    """True if the open file is still the one that is found there."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
