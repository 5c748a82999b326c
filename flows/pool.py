"""Worker processes for the CPU stages: outside the interpreter lock, and a time-out really ends what hangs.

    with workers(recipe.run) as pool:
        call(pool, 3600, shard_source, store, source, corpus)

Imports no Prefect: the processes start with this module. Bytes do not depend on how many there are.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as OutOfTime
from contextlib import contextmanager
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

from storage.error import FatalError, RetryableError
from tasks.config import Run

R = TypeVar("R")


@contextmanager
def workers(run: Run) -> Iterator[ProcessPool]:
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
        yield pool
        pool.close()  # type: ignore[no-untyped-call]
    except BaseException:
        pool.stop()  # type: ignore[no-untyped-call]
        raise
    finally:
        pool.join()


def call(pool: ProcessPool, timeout: float, fn: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    """Runs `fn` in a worker process and waits. FatalError after `timeout` seconds, RetryableError if it died."""
    future = pool.schedule(fn, args=args, kwargs=kwargs, timeout=timeout)
    try:
        return future.result()
    except OutOfTime as error:
        raise FatalError(
            f"took longer than {timeout:g} seconds and its worker process was ended; "
            "raise run.shard_timeout or look at the source"
        ) from error
    except ProcessExpired as error:
        raise RetryableError(
            f"its worker process died with status {error.exitcode} (out of memory?); lower run.workers if it recurs"
        ) from error
    except BaseException:
        # The flow was told to stop while we wait: the worker has nobody left to work for.
        future.cancel()  # type: ignore[no-untyped-call]
        raise


def _begin(threads: int, parent: int) -> None:
    """First thing in a worker: share the cores, and die when the flow's process dies."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    # The terminal sends Ctrl-C to the whole group; the flow decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
