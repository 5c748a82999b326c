"""Ray instead of worker processes: shards, blocks and the teacher's targets as Ray tasks, on one machine or many.

    with ray_workers(recipe.ray, recipe.run.window, teacher=True) as pool:
        pool.call(3600, teach_shard, store, blocks, opened)

Needs the extra `ray`, this code and the same Python on every node, and a store, corpus and teacher that every node
reads under the same address. Plain Ray tasks and not Prefect's Ray runner: that would run our Prefect tasks on the
nodes, each with a client of the Prefect server and its password, and what is in flight would no longer be counted here.
"""

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from flows.pipeline.process_pool import LOOK_SECONDS, StoppedError, time_out_error
from storage.artifact import NODE
from storage.errors import FatalError, RetryableError
from tasks.recipe.config import RaySettings

R = TypeVar("R")


@contextmanager
def ray_workers(settings: RaySettings, width: int, *, teacher: bool = False) -> Iterator["_RayTasks"]:
    """Calls become tasks of the cluster, each with the CPUs, GPUs and memory of its kind, `width` at once.

    FatalError if Ray is not installed or the cluster does not answer. When the block ends by an error, what is in
    flight is ended.
    """
    _connect(settings.address)
    tasks = _RayTasks(_resources(settings, teacher), width)
    try:
        yield tasks
    finally:
        tasks.active = False


def _connect(address: str) -> None:
    """Joins the cluster once a process; Ray leaves it when the process ends."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise FatalError("run.engine = ray, but Ray is not installed; pip install -e '.[ray]'") from error
    if ray.is_initialized():
        return
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        raise FatalError(
            f"ray.address = {address}: no Ray cluster takes us there ({error}); start one with `ray start`, and give "
            "its token, if it has one, as RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error


def _resources(settings: RaySettings, teacher: bool) -> dict[str, Any]:
    memory = settings.teacher_memory if teacher else settings.memory
    found: dict[str, Any] = {"num_cpus": settings.teacher_cpus if teacher else settings.cpus}
    if teacher and settings.teacher_gpus:
        found["num_gpus"] = settings.teacher_gpus
    return found | ({"memory": memory} if memory else {})


class _RayTasks:
    """A `Pool` of the whole cluster. Ray queues what no node has room for."""

    is_here = False

    def __init__(self, resources: dict[str, Any], width: int) -> None:
        import ray

        # Ray repeats nothing by itself: the flow does, and counts it. A worker process stays after a call
        # (max_calls), with the teacher that it loaded; Ray ends those with a GPU after each one unless told so.
        self.begin = ray.remote(
            max_calls=0, max_retries=0, num_returns="streaming", scheduling_strategy="SPREAD", **resources
        )(_begin)
        self.active, self.width = True, width

    def call(self, timeout: float, fn: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """As `Pool` says. `timeout` counts from the start on a node, however long the task was queued."""
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        answers = self.begin.remote(fn, args, kwargs)
        try:
            self._next(answers, None)  # it has begun
            result: R = self._next(answers, timeout)
        except StoppedError:
            ray.cancel(answers, force=True)  # ends its process
            raise
        except TimeoutError as error:
            ray.cancel(answers, force=True)
            raise time_out_error(timeout) from error
        except RayTaskError as error:
            raise error.cause from error
        except TaskCancelledError as error:
            raise StoppedError("its Ray task was cancelled") from error
        except RayError as error:
            raise RetryableError(f"its Ray task was lost ({type(error).__name__}): {error}") from error
        return result

    def _next(self, answers: Any, timeout: float | None) -> Any:
        """The next value that the task yields. TimeoutError after `timeout` seconds, StoppedError of a stopped pool."""
        import ray

        end = math.inf if timeout is None else time.monotonic() + timeout
        while not ray.wait([answers], timeout=max(0.0, min(LOOK_SECONDS, end - time.monotonic())))[0]:
            if not self.active:
                raise StoppedError("the run was told to stop")
            if time.monotonic() >= end:
                raise TimeoutError
        return ray.get(next(answers))


def _begin(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The body of every task: says that it has begun, then what `fn` returns. Receipts name the node."""
    import ray

    os.environ[NODE] = f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:8]}"
    yield None
    yield fn(*args, **kwargs)
