"""File locks, with a second process as the other holder."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.errors import RetryableError
from storage.files import lock as locks
from storage.files.lock import acquire, try_acquire

HOLDER = """
import sys
from pathlib import Path
from storage.files.lock import acquire
lock = acquire(Path(sys.argv[1]), shared=sys.argv[2] == "shared")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def other_process(path: Path, mode: str = "exclusive") -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until its stdin is closed, or until it is killed."""
    command = [sys.executable, "-c", HOLDER, str(path), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "test.lock"


@pytest.mark.parametrize("mode", ["exclusive", "shared"])
def test_try_acquire_returns_none_while_another_process_holds_the_lock(path: Path, mode: str) -> None:
    with other_process(path, mode):
        assert try_acquire(path) is None
    assert try_acquire(path) is not None


def test_a_killed_holder_releases_the_lock(path: Path) -> None:
    with other_process(path) as process:
        process.kill()
        process.wait()
        assert try_acquire(path) is not None


def test_acquire_waits_until_the_other_process_ends(path: Path) -> None:
    acquired = threading.Event()

    def wait() -> None:
        with acquire(path):
            acquired.set()

    with other_process(path) as process:
        waiter = threading.Thread(target=wait)
        waiter.start()
        assert not acquired.wait(0.3)
        assert process.stdin is not None
        process.stdin.close()
        assert acquired.wait(30)
        waiter.join()


def test_shared_locks_coexist(path: Path) -> None:
    with other_process(path, "shared"), acquire(path, shared=True):
        assert try_acquire(path) is None


def test_a_lock_ends_with_release_with_block_or_object(path: Path) -> None:
    lock = acquire(path)
    lock.release()
    lock.release()
    with acquire(path):
        assert try_acquire(path) is None
    lock = acquire(path)
    assert try_acquire(path) is None
    del lock
    assert try_acquire(path) is not None


def test_without_create_a_missing_file_is_not_locked(path: Path) -> None:
    assert try_acquire(path, create=False) is None
    assert not path.parent.exists()
    acquire(path).release()
    assert try_acquire(path, create=False) is not None


def test_acquire_locks_the_new_file_if_the_old_one_is_deleted_meanwhile(path: Path) -> None:
    acquired = threading.Event()
    locked: list[locks.FileLock] = []

    def wait() -> None:
        locked.append(acquire(path))
        acquired.set()

    with other_process(path):
        waiter = threading.Thread(target=wait)
        waiter.start()
        assert not acquired.wait(0.3)
        path.unlink()
    waiter.join(30)
    assert path.exists()
    assert try_acquire(path) is None
    locked.clear()
    assert try_acquire(path) is not None


def test_a_file_that_is_deleted_again_and_again_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.samestat", lambda *_: False)
    for call in (acquire, try_acquire):
        with pytest.raises(RetryableError, match=r"test\.lock was deleted repeatedly"):
            call(path)


def test_touch_sets_the_modification_time(path: Path) -> None:
    with acquire(path) as lock:
        before = path.stat().st_mtime_ns
        lock.touch()
        assert path.stat().st_mtime_ns >= before
