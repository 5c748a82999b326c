"""Makes artifacts in worker processes of this machine; `Pool` is the interface of these and of Ray tasks (ray_pool.py).

    with workers(recipe.run) as pool:
        pool.call(3600, shard_source, store, source, corpus)

Processes, not threads: they do not share an interpreter lock, and a call that hangs is killed at its time-out. An
artifact's bytes do not depend on the kind or number of workers. Imports no Prefect, since every worker process imports
this module.
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
"""Interval at which a thread that waits for a worker process checks that the pool is still active."""


class StoppedError(Exception):
    """The run was stopped: the artifact in progress stays missing, and that is no failure."""


class Pool(Protocol):
    """Runs calls in other processes, or in this one."""

    width: int
    """Number of concurrent calls that keep it busy."""
    is_here: bool
    """True if a call runs in this process."""

    def call(self, timeout: float, fn: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Calls `fn(*args, **kwargs)` and returns its result or raises its error; `fn` must be picklable.

        FatalError after `timeout` seconds, RetryableError if its process dies, StoppedError if the pool is stopped.
        """


@contextmanager
def workers(run: RunSettings) -> Iterator[Pool]:
    """A pool of `run.workers` processes. They start with the first call and end with the block, also after an error."""
    threads = max(1, (os.cpu_count() or 1) // run.workers)
    pool = ProcessPool(
        max_workers=run.workers,
        initializer=_start_worker,
        initargs=(threads, os.getpid()),
        # Not fork: a forked child would inherit locks that other threads hold.
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
        self.width = 2 * workers  # two calls per process, so that none waits for its next one

    def call(self, timeout: float, fn: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """See `Pool`. Polls the pool: pebble never resolves the futures that were running when a pool was stopped."""
        future = self.pool.schedule(fn, args=args, kwargs=kwargs, timeout=timeout)
        while not wait([future], POLL_SECONDS).done:
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
    """The error of a call whose process was killed at its time-out."""
    return FatalError(
        f"took longer than {timeout:g} seconds and its worker process was ended; "
        "raise run.shard_timeout or check the source"
    )


def _start_worker(threads: int, parent: int) -> None:
    """Initializes a worker process: `threads` for the tokenizer, and SIGKILL when the flow's process dies."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    # A session of its own: Ctrl-C in a terminal and Prefect's SIGTERM must reach the flow only, which ends the pool.
    os.setsid()
    set_parent_death_signal(signal.SIGKILL, parent)
