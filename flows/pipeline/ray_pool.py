"""Makes shards, blocks and the teacher's targets in Ray tasks, on one machine or many.

    with ray_workers(recipe.ray, recipe.run.window, teacher=True) as pool:
        pool.call(3600, with_capture, make_targets, opened, store, blocks)

Requires the extra `ray`, this code and the same Python on every node, and a store, a corpus and a teacher that have the
same address on every node. Uses plain Ray tasks instead of Prefect's Ray task runner: with the task runner, every node
would need access to the Prefect server and its password, and `run.window` could not limit the tasks in flight.
"""

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from flows.pipeline.process_pool import POLL_SECONDS, StoppedError, time_out_error
from storage.artifact import NODE
from storage.errors import FatalError, RetryableError
from tasks.recipe.config import RaySettings

R = TypeVar("R")


@contextmanager
def ray_workers(settings: RaySettings, width: int, *, teacher: bool = False) -> Iterator["_RayTasks"]:
    """Yields a pool of `width` concurrent Ray tasks with the CPUs, GPUs and memory (bytes) of the settings.

    FatalError if Ray is not installed or the cluster does not respond. Tasks in flight are cancelled at the end of the
    `with` block.
    """
    _connect(settings.address)
    tasks = _RayTasks(_resources(settings, teacher), width)
    try:
        yield tasks
    finally:
        tasks.active = False


def _connect(address: str) -> None:
    """Connects this process to the cluster on the first call. Ray disconnects at the end of the process."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise FatalError(
            "run.engine is ray, but Ray is not installed; install it with `pip install -e '.[ray]'`"
        ) from error
    if ray.is_initialized():
        return
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        raise FatalError(
            f"cannot connect to a Ray cluster at ray.address = {address} ({error}); start one with `ray start`, and if "
            "it requires a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error


def _resources(settings: RaySettings, teacher: bool) -> dict[str, Any]:
    memory = settings.teacher_memory if teacher else settings.memory
    resources: dict[str, Any] = {"num_cpus": settings.teacher_cpus if teacher else settings.cpus}
    if teacher and settings.teacher_gpus:
        resources["num_gpus"] = settings.teacher_gpus
    return resources | ({"memory": memory} if memory else {})


class _RayTasks:
    """A `Pool` of Ray tasks. Ray queues tasks for which no node has free resources."""

    is_here = False

    def __init__(self, resources: dict[str, Any], width: int) -> None:
        import ray

        # max_retries=0: Prefect retries, and counts the attempts. max_calls=0: the worker process stays after a call
        # and keeps the loaded teacher; by default Ray ends a process with a GPU after each call.
        self.start = ray.remote(
            max_calls=0, max_retries=0, num_returns="streaming", scheduling_strategy="SPREAD", **resources
        )(_run)
        self.active, self.width = True, width

    def call(self, timeout: float, fn: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """See `Pool`. The time-out starts when the task starts on a node; time in Ray's queue does not count."""
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        outputs = self.start.remote(fn, args, kwargs)
        try:
            self._next(outputs, None)  # returns once the task has started
            result: R = self._next(outputs, timeout)
        except StoppedError:
            ray.cancel(outputs, force=True)  # kills its process
            raise
        except TimeoutError as error:
            ray.cancel(outputs, force=True)
            raise time_out_error(timeout) from error
        except RayTaskError as error:
            raise error.cause from error
        except TaskCancelledError as error:
            raise StoppedError("the Ray task was cancelled") from error
        except RayError as error:
            raise RetryableError(f"the Ray task was lost ({type(error).__name__}): {error}") from error
        return result

    def _next(self, outputs: Any, timeout: float | None) -> Any:
        """Waits for the next output of the task and returns it.

        TimeoutError after `timeout` seconds, StoppedError if the pool is stopped.
        """
        import ray

        end = math.inf if timeout is None else time.monotonic() + timeout
        while not ray.wait([outputs], timeout=max(0.0, min(POLL_SECONDS, end - time.monotonic())))[0]:
            if not self.active:
                raise StoppedError("the run was stopped")
            if time.monotonic() >= end:
                raise TimeoutError
        return ray.get(next(outputs))


def _run(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Body of every Ray task: sets the node's name for receipts, yields None at the start, then the result of `fn`."""
    import ray

    os.environ[NODE] = f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:8]}"
    yield None
    yield fn(*args, **kwargs)
