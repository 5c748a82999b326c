"""Worker processes: errors come back whole, a hung one is really ended, a dead one is a passing error."""

import os
import signal
import time
from pathlib import Path

import pytest

from flows.pool import call, workers
from storage.error import FatalError, RetryableError
from tasks.config import Run


def refuse(file: str) -> None:
    raise FatalError("line 7 is not JSON", file, 7)


def hang(note: str) -> None:
    Path(note).write_text(str(os.getpid()))
    while True:
        time.sleep(1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_error_keeps_its_file_and_line() -> None:
    with workers(Run(workers=1)) as pool, pytest.raises(FatalError, match="not JSON") as caught:
        call(pool, 60, refuse, "part.jsonl")
    assert (caught.value.file, caught.value.line) == ("part.jsonl", 7)


def test_a_hung_worker_is_ended_and_the_next_call_works(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with workers(Run(workers=1)) as pool:
        with pytest.raises(FatalError, match="took longer than 5 seconds"):
            call(pool, 5, hang, str(note))
        assert call(pool, 60, len, "four") == 4
    assert not is_alive(int(note.read_text()))


def test_a_worker_that_dies_is_a_passing_error() -> None:
    with workers(Run(workers=1)) as pool, pytest.raises(RetryableError, match="died"):
        call(pool, 60, die)
