"""Starts processes for tests, finds all their descendants, waits for conditions, and kills processes.

with running(["prefect", "server", "start"], folder, variables): ...
started_for(folder)                 # all processes with the folder in the variable MARK, which children inherit
wait_for(lambda: not started_for(folder))
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

MARK = "DISTIL_TEST_FOLDER"
"""Environment variable of every process that is started for a test: the folder of the test."""
LIMIT = 900.0
"""Seconds after which a command or a run counts as hung; the imports of a flow take minutes on a busy machine."""


def start(
    module: list[str], folder: Path, variables: Mapping[str, str], log: Path | None = None, **options: Any
) -> "subprocess.Popen[bytes]":
    """Starts a Python module in a folder; its output goes to `log`, by default folder/log."""
    folder.mkdir(parents=True, exist_ok=True)
    with (log or folder / "log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=folder,
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            **options,
        )


@contextmanager
def running(
    module: list[str], folder: Path, variables: Mapping[str, str], log: Path | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Runs a Python module inside the block, then sends SIGTERM to it and SIGKILL to its remaining descendants."""
    process = start(module, folder, variables, log)
    try:
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in children:
            kill(child.pid)


def started_for(folder: Path) -> list[psutil.Process]:
    """Returns all live processes that were started for a test's folder, including those that left the process tree."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def kill(pid: int) -> None:
    """Sends SIGKILL, as the kernel does when memory runs out; ignores processes that have already ended."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def kill_tree(process: "subprocess.Popen[Any]") -> None:
    """Sends SIGKILL to a process and all its descendants."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for pid in (*(child.pid for child in children), process.pid):
        kill(pid)
    process.wait()


def wait_for(
    condition: Callable[[], Any],
    seconds: float = LIMIT,
    *,
    process: "subprocess.Popen[Any] | None" = None,
    poll_seconds: float = 0.1,
) -> None:
    """Returns once the condition is true. Fails after `seconds`, or if `process` ends first."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition was not true within {seconds:g} seconds"
        assert process is None or process.poll() is None, "the process ended before the condition was true"
        time.sleep(poll_seconds)
