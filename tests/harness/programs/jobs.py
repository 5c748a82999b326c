"""Functions that worker processes run in tests: one refuses, one hangs, one dies, one counts its attempts.

They have a module of their own because a worker process imports the module of its function: imports of this one take
0.2 seconds, those of a test that uses Prefect and transformers take five.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage.errors import FatalError
from storage.store import Store


def refuse(file: str) -> None:
    """Raises a FatalError that names line 7 of `file`."""
    raise FatalError("line 7 is not JSON", file, 7)


def hang(note: str) -> None:
    """Writes its process id to the file `note` and never returns."""
    Path(note).write_text(str(os.getpid()))
    while True:
        time.sleep(1)


def die() -> None:
    """Ends its process with SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def counted(note: Path, fn: Callable[..., Any], *arguments: Any, force: bool = False) -> None:
    """Calls `fn` and adds a line to the file `note`, one per attempt."""
    with note.open("a") as file:
        file.write("tried\n")
    fn(*arguments)


def attempts(note: Path) -> int:
    """The number of attempts that `counted` wrote to `note`."""
    return len(note.read_text().splitlines())


def reset_at_first(store: Store, note: Path) -> None:
    """Meets a network that resets the first connection."""
    with store.translate_errors():
        if attempts(note) == 1:
            raise ConnectionResetError("connection reset by peer")
