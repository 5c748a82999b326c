"""Processes that a test starts: run one, find everything that came from it, wait for what it does, kill it.

with running(["prefect", "server", "start"], folder, variables): ...
started_for(folder)                 # all processes whose variable MARK names the folder; children inherit it
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
"""In the environment of every process that is started for a test: the test's folder."""
LIMIT = 900.0
"""Seconds after which a command or a run counts as hung; a busy machine takes minutes to import what a flow needs."""


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
    """A Python module that runs meanwhile. Afterwards it gets SIGTERM, and what remains of its tree SIGKILL."""
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
    """All living processes that were started for a test's folder: trainers and servers too, wherever they are in the
    process tree."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def kill(pid: int) -> None:
    """SIGKILL, as the kernel sends it when memory runs out; a process that has ended already is no error."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL for a process and all its descendants."""
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
    """Returns once the condition is true. Fails after `seconds`, or when `process` ends before that."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true within {seconds:g} seconds"
        assert process is None or process.poll() is None, "the process ended first"
        time.sleep(poll_seconds)
