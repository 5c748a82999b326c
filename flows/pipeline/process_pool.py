"""Runs calls in worker processes of this machine. `Pool` is the interface that ray_pool.py implements too.

    with workers(recipe.run) as pool:
        pool.call(3600, shard_source, store, source, corpus)

Processes are used instead of threads because they do not share an interpreter lock, and because a call that hangs can
be killed at its time-out. An artifact's bytes do not depend on the kind or number of workers. This module does not
import Prefect, since every worker process imports it.
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

POLL_SECONDS = 1.0
"""Interval at which a thread that waits for a call checks whether its pool is still active."""


class StoppedError(Exception):
    """The run was stopped. The artifact in progress stays missing, which is not a failure."""


class Pool(Protocol):
    """Runs calls in other processes, or in this one."""

    width: int
    """Number of concurrent calls that keep the pool busy."""
    is_here: bool
    """True if a call runs in this process."""

    def call(self, timeout: float, fn: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Returns `fn(*args, **kwargs)` or raises its error; `fn` and its arguments must be picklable.

        FatalError after `timeout` seconds, RetryableError if the process of the call dies, StoppedError if the pool is
        stopped.
        """


@contextmanager
def workers(run: RunSettings) -> Iterator[Pool]:
    """Yields a pool of `run.workers` processes, which start at the first call and end with the `with` block."""
    threads = max(1, (os.cpu_count() or 1) // run.workers)
    pool = ProcessPool(
        max_workers=run.workers,
        initializer=_start_worker,
        initargs=(threads, os.getpid()),
        # Not "fork": a forked child inherits locks in the state in which other threads hold them.
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
    """A `Pool` of worker processes on this machine."""

    is_here = False

    def __init__(self, pool: ProcessPool, workers: int) -> None:
        self.pool = pool
        self.width = 2 * workers  # two calls per process, so that no process waits for its next call

    def call(self, timeout: float, fn: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """See `Pool`. Polls the pool, since pebble never resolves the running futures of a pool that is stopped."""
        future = self.pool.schedule(fn, args=args, kwargs=kwargs, timeout=timeout)
        while not wait([future], POLL_SECONDS).done:
            if not self.pool.active:
                raise StoppedError("the worker processes were stopped")
        try:
            return future.result()
        except OutOfTime as error:
            raise time_out_error(timeout) from error
        except BrokenProcessPool as error:
            raise StoppedError("the worker processes were stopped") from error
        except ProcessExpired as error:
            raise RetryableError(
                f"the worker process died with status {error.exitcode} (out of memory?); if this recurs, reduce "
                "run.workers"
            ) from error


def time_out_error(timeout: float) -> FatalError:
    """Returns the error of a call whose process was killed at its time-out."""
    return FatalError(
        f"the job took longer than {timeout:g} seconds, so its worker process was killed; increase run.shard_timeout, "
        "or check the source"
    )


def _start_worker(threads: int, parent: int) -> None:
    """Initializes a worker process: sets the tokenizer's number of threads, and SIGKILL for when the parent dies."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    # A new session: Ctrl-C in a terminal and Prefect's SIGTERM must reach only the flow, which ends the pool.
    os.setsid()
    set_parent_death_signal(signal.SIGKILL, parent)
