"""Defines the policy of all Prefect tasks and flows: retries, time-outs, names, caching and persistence of results.

    bound_task(make_group, "compute targets", recipe.run).submit("fr_meta_part_3-0000", group)
    distill = bound_flow(run_distill, "distill", run_name="{name}")

Retries      A task run is retried up to `run.retries` times, only after RetryableError, with delays that double
             (retry_delays). Flows are not retried, since a new run computes only missing artifacts.
Time-outs    Prefect's time-outs are not used, since they cannot end a thread. The pool kills the process of a call
             after job_timeout. A trainer gets GRACE_SECONDS between SIGTERM and SIGKILL; training has no time limit.
Names        Task runs are named `VERB LABEL` (`pack fr_meta_part_3-0000`), flow runs by `run_name` of bound_flow.
Caching      NO_CACHE: only the store records what is done. A cached task run would hide a deleted artifact.
Persistence  persist_result=False: results are artifacts in the store, not values in Prefect.
"""

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from prefect import Flow, State, Task, flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.futures import PrefectFuture
from prefect.states import Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from storage.errors import DistilError, RetryableError
from tasks.parent_death import set_parent_death_signal
from tasks.recipe.config import Recipe, RunSettings
from tasks.recipe.load import make_recipe

P = ParamSpec("P")

R = TypeVar("R")

MAX_RETRY_DELAY = 60.0
"""Longest delay in seconds. It is short because a stopped run waits for the end of the current delay."""

GRACE_SECONDS = 60.0
"""Time in seconds that a trainer gets for its checkpoint after SIGTERM."""

MAX_THREADS = 5000
"""Upper limit of `run.window`. Each task run in flight has one thread, which is started when it is needed."""


def is_retryable(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    """Returns True if the task run failed with a transient error. Every other error would recur."""
    return isinstance(state.data, RetryableError)


def retry_delays(run: RunSettings) -> list[float]:
    """Returns the delay in seconds before each retry: `run.retry_seconds`, doubled each time, up to MAX_RETRY_DELAY."""
    return [min(MAX_RETRY_DELAY, run.retry_seconds * 2**number) for number in range(run.retries)]


def job_timeout(run: RunSettings) -> float:
    """Returns the seconds after which a pool kills the process of a call (process_pool.py, ray_pool.py)."""
    return run.shard_timeout


def bound_task(fn: Callable[..., R], verb: str, run: RunSettings) -> Task[..., R]:
    """Returns a Prefect task for `fn`. Its runs are named `VERB LABEL`; `label` is the first parameter of `fn`."""
    return task(
        name=verb,
        task_run_name=f"{verb} {{label}}",
        retries=run.retries,
        retry_delay_seconds=retry_delays(run),
        retry_condition_fn=is_retryable,
        persist_result=False,
        cache_policy=NO_CACHE,
    )(fn)


def run_one(verb: str, label: str, work: Callable[[], R], run: RunSettings) -> R:
    """Runs `work` in this thread as a task run named `VERB LABEL`, and returns its result or raises its error."""
    return cast(R, bound_task(_call, verb, run)(label, work))


def _call(label: str, work: Callable[[], R]) -> R:
    """Body of the task in `run_one`. `label` is used only in the name of the task run."""
    return work()


def bound_flow(
    fn: Callable[Concatenate[Recipe, P], Any], name: str, *, run_name: str
) -> Flow[Concatenate[Recipe, P], Any]:
    """Returns a Prefect flow for `fn`. On a DistilError the run ends Failed with one sentence instead of a traceback.

    `run_name` is a format string of the flow's parameters and `name`, the recipe's name. A deployment passes the recipe
    as plain values. They are validated here, since Prefect would report an invalid combination as a traceback.
    """

    @wraps(fn)
    def body(recipe: Recipe | dict[str, Any], *args: P.args, **kwargs: P.kwargs) -> Any:
        end_with_worker(runtime.flow_run.id)
        try:
            return fn(make_recipe(recipe, "recipe") if isinstance(recipe, dict) else recipe, *args, **kwargs)
        except DistilError as error:
            get_run_logger().error(error.message)
            return Failed(message=error.message)

    def flow_run_name() -> str:
        parameters = dict(runtime.flow_run.parameters)
        recipe = parameters.pop("recipe")  # a Recipe or a dictionary, so a format string cannot use its fields
        return run_name.format(**parameters, name=recipe["name"] if isinstance(recipe, dict) else recipe.name).strip()

    bound = flow(
        name=name,
        flow_run_name=flow_run_name,
        persist_result=False,
        validate_parameters=False,
        task_runner=cast(TaskRunner[PrefectFuture[Any]], ThreadPoolTaskRunner[Any](max_workers=MAX_THREADS)),
    )(body)
    return cast(Flow[Concatenate[Recipe, P], Any], bound)


def end_with_worker(flow_run: str | None) -> None:
    """Ends this process as on SIGTERM when the Prefect worker that started it for this flow run dies.

    Without its worker, a run could no longer be cancelled. Has no effect on runs that no worker started (in a terminal
    or a test) or if the parent is process 1. tasks/parent_death.py lists all mechanisms of this kind.
    """
    by_worker = flow_run is not None and os.environ.get("PREFECT__FLOW_RUN_ID") == flow_run
    if sys.platform == "linux" and by_worker and os.getppid() > 1:
        signal.signal(signal.SIGHUP, _on_worker_death)
        set_parent_death_signal(signal.SIGHUP)


def _on_worker_death(*_: object) -> None:
    # The kernel sends the signal again for every thread of the worker that ends.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # The dead worker read this process's output, so writing would now raise an error before the state is reported.
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(devnull, stream)
    os.close(devnull)
    signal.raise_signal(signal.SIGTERM)
