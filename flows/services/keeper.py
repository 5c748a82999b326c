"""Runs one command, and ends all its descendants when the command or the process that started the keeper ends.

    python -m flows.services.keeper PARENT_PID GRACE_SECONDS COMMAND ...

process.py starts one keeper per service, so this module imports little. tasks/parent_death.py lists the failures that
the keeper covers, and those that other mechanisms cover.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

from tasks.parent_death import become_subreaper, signal_on_parent_death

POLL_SECONDS = 0.1


def main(arguments: Sequence[str]) -> int:
    """Runs the command until it or the parent ends. Returns its exit status, or 128 + signal if a signal ended it."""
    parent, grace, command = int(arguments[0]), float(arguments[1]), list(arguments[2:])
    received: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda given, _frame: received.append(given))
    become_subreaper()
    # If the keeper itself is killed, the kernel sends SIGTERM to the command.
    child = subprocess.Popen(command, preexec_fn=signal_on_parent_death())
    status = _watch(child.pid, parent, received, grace)
    _sweep(0.0 if status is None else grace)
    child.returncode = -signal.SIGKILL if status is None else status  # already reaped by _reap
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _watch(child: int, parent: int, received: list[int], grace: float) -> int | None:
    """Waits for the command. Returns its exit status, or None if it still runs `grace` seconds after SIGTERM.

    The command gets SIGTERM when the keeper receives a signal or the parent dies.
    """
    end = float("inf")
    while time.monotonic() < end:
        ended = _reap()
        if child in ended:
            return ended[child]
        if end == float("inf") and (received or os.getppid() != parent):
            os.kill(child, signal.SIGTERM)
            end = time.monotonic() + grace
        time.sleep(POLL_SECONDS)
    return None


def _reap() -> dict[int, int]:
    """Reaps all child processes that have ended, without blocking.

    Returns the exit status by pid; a negative status is a signal number.
    """
    ended = {}
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def _sweep(grace: float) -> None:
    """Ends all descendants: SIGTERM, then after at most `grace` seconds SIGKILL until none is left."""
    signalled: set[int] = set()
    end = time.monotonic() + grace
    while time.monotonic() < end and (left := _descendants(recursive=False)):
        # Only direct children: each stops its own children first, and those left over become children of the keeper.
        for process in left:
            if process.pid not in signalled:
                signalled.add(process.pid)
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
        time.sleep(POLL_SECONDS)
    while left := _descendants(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(POLL_SECONDS)


def _descendants(*, recursive: bool) -> list[psutil.Process]:
    _reap()
    processes: list[psutil.Process] = psutil.Process().children(recursive=recursive)
    return processes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
