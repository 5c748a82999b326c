"""Ends child processes when the process that started them dies, even by SIGKILL: the parent-death signal of Linux.

    subprocess.Popen(command, preexec_fn=signal_on_parent_death())      # in the parent: for a command
    set_parent_death_signal(signal.SIGKILL, parent=pid)                 # in the child: for this process itself

The signal is set by the option PR_SET_PDEATHSIG of prctl(2). The setting survives exec and is not inherited by
children. On other systems, the functions of this module do nothing.

Four mechanisms prevent left-over processes. Each covers a failure that the other three do not:

    parent-death signal   The parent is killed and cannot clean up: the trainer, torchrun's ranks, pool workers and flow
                          runs still end. The signal reaches direct children only.
    keeper (subreaper)    A service ends or crashes while its descendants run in sessions of their own: the keeper
                          (flows/services/keeper.py) adopts and ends them, unless the keeper itself gets SIGKILL.
    process group         The trainer ends, or is killed after its grace period, while a process that it started still
                          runs: SIGKILL to the group ends both. A live flow process must send it.
    lease                 A process on another machine, or one that no signal reaches, still trains the same run: it
                          finds a newer lease (storage/lease.py) before its next checkpoint and stops.

This module imports only the standard library, since a keeper runs next to every service.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1

PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def set_parent_death_signal(signum: int, parent: int | None = None) -> None:
    """Makes the kernel send `signum` to this process when its parent dies.

    `parent` is the process id of the expected parent. If that process has already died, no signal would follow, so this
    process exits at once with status 1.
    """
    if _libc is None:
        return
    _libc.prctl(PR_SET_PDEATHSIG, signum)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def signal_on_parent_death(signum: int = signal.SIGTERM) -> Callable[[], None]:
    """Returns a `preexec_fn` for Popen: the command receives `signum` when the calling process dies.

    The function only calls a C function that is already loaded; little else is safe after a fork in a process with
    threads.
    """
    parent = os.getpid()

    def before_exec() -> None:
        set_parent_death_signal(signum, parent)

    return before_exec


def become_subreaper() -> None:
    """Makes this process the parent of every descendant whose own parent dies (PR_SET_CHILD_SUBREAPER)."""
    if _libc is not None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
