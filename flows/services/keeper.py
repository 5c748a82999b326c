"""Keeps one command and all that comes of it: when the command ends, or whoever started the keeper, nothing is left.

    python -m flows.services.keeper PARENT_PID GRACE_SECONDS COMMAND ...

Children of a server or worker often have sessions of their own, so neither a signal to a group nor the death of their
parent ends them. On Linux the keeper is the reaper of all its descendants: they become its children when their own
parent dies, so it always knows them. Started by service.py. Imports little: one runs beside each server.
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
    """Runs the command to its end, or to the parent's; returns its exit status (128 + signal if one ended it)."""
    parent, grace, command = int(arguments[0]), float(arguments[1]), list(arguments[2:])
    told: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda given, _frame: told.append(given))
    become_subreaper()
    # If the keeper itself is killed, the command still gets a SIGTERM.
    child = subprocess.Popen(command, preexec_fn=signal_on_parent_death())
    status = _watch(child.pid, parent, told, grace)
    _sweep(0.0 if status is None else grace)
    child.returncode = -signal.SIGKILL if status is None else status  # it was waited for already
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _watch(child: int, parent: int, told: list[int], grace: float) -> int | None:
    """Waits until the command ended, and asks it to once we or our parent are told to; None if it did not in time."""
    end = float("inf")
    while time.monotonic() < end:
        ended = _reap()
        if child in ended:
            return ended[child]
        if end == float("inf") and (told or os.getppid() != parent):
            os.kill(child, signal.SIGTERM)
            end = time.monotonic() + grace
        time.sleep(POLL_SECONDS)
    return None


def _reap() -> dict[int, int]:
    """Takes note of all children that ended: pid -> exit status, negative for a signal."""
    ended = {}
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def _sweep(grace: float) -> None:
    """Ends what is left: SIGTERM and time for a checkpoint, then SIGKILL until nothing is there."""
    asked: set[int] = set()
    end = time.monotonic() + grace
    while time.monotonic() < end and (left := _family(recursive=False)):
        # Only our own children: each stops its own in good order, and whom it leaves becomes ours.
        for process in left:
            if process.pid not in asked:
                asked.add(process.pid)
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
        time.sleep(POLL_SECONDS)
    while left := _family(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(POLL_SECONDS)


def _family(*, recursive: bool) -> list[psutil.Process]:
    _reap()
    family: list[psutil.Process] = psutil.Process().children(recursive=recursive)
    return family


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
