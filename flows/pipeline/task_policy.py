"""All policy of Prefect tasks and flows: retries, time-outs, names, caching and persistence of results.

    bound_task(make_group, "teach", recipe.run).submit("fr_meta_part_3-0000", group)
    distill = bound_flow(run_chain, "distill", run_name="{name}")

Retries      `run.retries` per task run, only after RetryableError, with delays that double (retry_delays). Flows are
             not retried: a new run computes only what is missing.
Time-outs    None of Prefect's, which cannot end a thread. The pool kills the process of a call after job_timeout; a
             trainer gets GRACE_SECONDS between SIGTERM and SIGKILL. Training itself has no limit.
Names        Task runs `VERB LABEL` (`teach fr_meta_part_3-0000`); flow runs by the `run_name` of bound_flow.
Caching      NO_CACHE: the store decides what is done. A cached task run would hide that its artifact was deleted.
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
"""Seconds. A stopped run waits for the last delay, so it is short."""

GRACE_SECONDS = 60.0
"""Time that a trainer gets for its checkpoint after SIGTERM."""

MAX_THREADS = 5000
"""Upper limit of `run.window`: one thread per task run in flight, started when needed."""


def is_retryable(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    """True for a transient error; every other error would recur."""
    return isinstance(state.data, RetryableError)


def retry_delays(run: RunSettings) -> list[float]:
    """Seconds before each retry: `run.retry_seconds`, doubled each time, up to MAX_RETRY_DELAY."""
    return [min(MAX_RETRY_DELAY, run.retry_seconds * 2**number) for number in range(run.retries)]


def job_timeout(run: RunSettings) -> float:
    """Seconds after which a pool kills the process of one call (process_pool.py, ray_pool.py)."""
    return run.shard_timeout


def bound_task(fn: Callable[..., R], verb: str, run: RunSettings) -> Task[..., R]:
    """A Prefect task for `fn`. Its runs are named `VERB LABEL`, where `label` is the first argument of `fn`."""
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
    """Runs `work` as a task run `VERB LABEL` in this thread; returns its result or raises its error."""
    return cast(R, bound_task(_call, verb, run)(label, work))


def _call(label: str, work: Callable[[], R]) -> R:
    """The body of `run_one`; `label` is only the name of the task run."""
    return work()


def bound_flow(
    fn: Callable[Concatenate[Recipe, P], Any], name: str, *, run_name: str
) -> Flow[Concatenate[Recipe, P], Any]:
    """A Prefect flow for `fn`. On a DistilError it ends Failed with one sentence instead of a traceback.

    `run_name` is a format string of the flow's parameters and `name`, the recipe's name. A deployment passes the recipe
    as plain values; they are validated here, since Prefect reports a rule across fields as a traceback.
    """

    @wraps(fn)
    def body(recipe: Recipe | dict[str, Any], *args: P.args, **kwargs: P.kwargs) -> Any:
        end_with_worker(runtime.flow_run.id)
        try:
            return fn(make_recipe(recipe, "recipe") if isinstance(recipe, dict) else recipe, *args, **kwargs)
        except DistilError as error:
            get_run_logger().error(error.message)
            return Failed(message=error.message)

    def named() -> str:
        parameters = dict(runtime.flow_run.parameters)
        recipe = parameters.pop("recipe")  # a Recipe or plain values, so a format string cannot use its fields
        return run_name.format(**parameters, name=recipe["name"] if isinstance(recipe, dict) else recipe.name).strip()

    bound = flow(
        name=name,
        flow_run_name=named,
        persist_result=False,
        validate_parameters=False,
        task_runner=cast(TaskRunner[PrefectFuture[Any]], ThreadPoolTaskRunner[Any](max_workers=MAX_THREADS)),
    )(body)
    return cast(Flow[Concatenate[Recipe, P], Any], bound)


def end_with_worker(flow_run: str | None) -> None:
    """Makes this process end as on SIGTERM when the Prefect worker that started it for this flow run dies.

    A run without its worker could not be cancelled any more. No effect on runs that no worker started (in a terminal,
    in a test) and under process 1. One of the mechanisms that tasks/parent_death.py lists.
    """
    by_worker = flow_run is not None and os.environ.get("PREFECT__FLOW_RUN_ID") == flow_run
    if sys.platform == "linux" and by_worker and os.getppid() > 1:
        signal.signal(signal.SIGHUP, _on_worker_death)
        set_parent_death_signal(signal.SIGHUP)


def _on_worker_death(*_: object) -> None:
    # The kernel sends the signal again for every thread of the worker that ends.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # The worker read this process's output: an error on writing a line would end it before it reports its state.
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(devnull, stream)
    os.close(devnull)
    signal.raise_signal(signal.SIGTERM)
