"""Pools that make artifacts outside this process: worker processes of this machine, or Ray tasks (ray_pool.py).

    with workers(recipe.run) as pool:
        pool.call(3600, shard_source, store, source, corpus)

Outside the interpreter lock, and a time-out really ends what hangs. Imports no Prefect: the processes start with this
module. Bytes do not depend on who makes them, or on how many there are.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as OutOfTime
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from pebble import ProcessExpired, ProcessPool

from storage.errors import FatalError, RetryableError
from tasks.parent_death import set_parent_death_signal
from tasks.recipe.config import RunSettings

R = TypeVar("R")

LOOK_SECONDS = 1.0
"""How often a thread that waits for a worker process looks whether the pool is still there."""


class StoppedError(Exception):
    """The run was told to stop; what was being made is as missing as before, and no failure."""


class Pool(Protocol):
    """Where a call goes."""

    width: int
    """So many calls at once keep it busy."""
    is_here: bool
    """True if a call runs in this process."""

    def call(self, timeout: float, fn: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Runs `fn`, a function of a module, elsewhere, waits for it and returns or raises what it does.

        FatalError after it ran for `timeout` seconds, RetryableError if its process died. StoppedError if the pool is
        stopped meanwhile.
        """


@contextmanager
def workers(run: RunSettings) -> Iterator[Pool]:
    """A pool of run.workers processes; they start with the first call and end with the block, whatever happens."""
    threads = max(1, (os.cpu_count() or 1) // run.workers)
    pool = ProcessPool(
        max_workers=run.workers,
        initializer=_begin,
        initargs=(threads, os.getpid()),
        # A forked child would inherit locks that other threads hold.
        context=multiprocessing.get_context("spawn"),
    )
    try:
        yield _Processes(pool, run.workers)
        pool.close()  # type: ignore[no-untyped-call]
    except BaseException:
        pool.stop()  # type: ignore[no-untyped-call]
        raise
    finally:
        pool.join()


class _Processes:
    """A `Pool` of processes of this machine."""

    is_here = False

    def __init__(self, pool: ProcessPool, workers: int) -> None:
        self.pool = pool
        self.width = 2 * workers  # a process never waits for its next task

    def call(self, timeout: float, fn: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """As `Pool` says. pebble leaves what was in flight of a stopped pool without an end, so it is looked after."""
        future = self.pool.schedule(fn, args=args, kwargs=kwargs, timeout=timeout)
        while not wait([future], LOOK_SECONDS).done:
            if not self.pool.active:
                raise StoppedError("its worker processes were stopped")
        try:
            return future.result()
        except OutOfTime as error:
            raise time_out_error(timeout) from error
        except BrokenProcessPool as error:
            raise StoppedError("its worker processes were stopped") from error
        except ProcessExpired as error:
            raise RetryableError(
                f"its worker process died with status {error.exitcode} (out of memory?); lower run.workers if it recurs"
            ) from error


def time_out_error(timeout: float) -> FatalError:
    """What is said of work whose process was ended since it took too long."""
    return FatalError(
        f"took longer than {timeout:g} seconds and its worker process was ended; "
        "raise run.shard_timeout or look at the source"
    )


def _begin(threads: int, parent: int) -> None:
    """First thing in a worker: share the cores, and die when the flow's process dies."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    # Ctrl-C in a terminal and Prefect's SIGTERM go to the whole group; the flow decides what they mean.
    os.setsid()
    set_parent_death_signal(signal.SIGKILL, parent)
