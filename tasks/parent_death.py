"""The parent-death signal of Linux: a child process ends when the process that started it dies, even by SIGKILL.

    subprocess.Popen(command, preexec_fn=signal_on_parent_death())      # in the parent: for a command
    set_parent_death_signal(signal.SIGKILL, parent=pid)                 # in the child: for this process itself

The signal is the option PR_SET_PDEATHSIG of prctl(2). It survives exec and is not inherited by children. On other
systems the functions here do nothing.

Four mechanisms act against left-over processes. Each covers a failure that the other three do not:

    parent-death signal   The parent is killed and runs no code of its own: trainer, torchrun's ranks, pool workers and
                          flow runs still end. It reaches direct children only.
    keeper (subreaper)    A service dies, or ends, and its descendants have sessions of their own. The keeper
                          (flows/services/keeper.py) adopts them and ends them. It does not survive its own SIGKILL.
    process group         The trainer ends, or is killed after its grace period, while a process that it started still
                          runs: SIGKILL to the group ends both. It needs a live flow process that sends it.
    lease                 A process on another machine, or one that no signal reaches, still trains the same run: it
                          finds a newer lease (storage/lease.py) before its next checkpoint and stops.

Imports nothing heavy, since a keeper runs next to every service.
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
    """Requests `signum` for this process when its parent dies.

    `parent` is the expected parent's process id. If that process is dead already, so that no signal will come, this
    process exits at once with status 1.
    """
    if _libc is None:
        return
    _libc.prctl(PR_SET_PDEATHSIG, signum)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def signal_on_parent_death(signum: int = signal.SIGTERM) -> Callable[[], None]:
    """A `preexec_fn`: the command gets `signum` when the calling process dies.

    It only calls a C function that is loaded already: after a fork in a process with threads, little else is safe.
    """
    parent = os.getpid()

    def before_exec() -> None:
        set_parent_death_signal(signum, parent)

    return before_exec


def become_subreaper() -> None:
    """Makes this process the parent of its descendants whose own parent dies (PR_SET_CHILD_SUBREAPER)."""
    if _libc is not None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
