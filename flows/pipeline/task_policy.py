"""How computations become Prefect tasks and flows: names, retries, caching and persistence, all on this page.

    bound_task(make_some, "teach", recipe.run).submit("fr_meta_part_3-0000", group)
    distill = bound_flow(run_chain, "distill")

Prefect keeps and caches nothing for us: the store says what is done. So persist_result is False and the cache policy
is NO_CACHE everywhere; a cache would bring a deleted artifact back as "Cached".
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


def is_retryable(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    """Only an error that may pass by itself is tried again."""
    return isinstance(state.data, RetryableError)


def retry_delays(run: RunSettings) -> list[float]:
    """Seconds before each retry: they double, up to a minute, since a run that is told to stop waits for the last."""
    return [min(MAX_RETRY_DELAY, run.retry_seconds * 2**number) for number in range(run.retries)]


def bound_task(fn: Callable[..., R], verb: str, run: RunSettings) -> Task[..., R]:
    """A task whose runs are named after the verb and its first argument, `label`: `teach fr_meta_part_3-0000`."""
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
    """Runs one computation as a task run `verb label`, here and now, and returns what it gives or raises."""
    return cast(R, bound_task(_call, verb, run)(label, work))


def _call(label: str, work: Callable[[], R]) -> R:
    """`label` only names the task run."""
    return work()


def bound_flow(
    fn: Callable[Concatenate[Recipe, P], Any], name: str, *, run_name: str
) -> Flow[Concatenate[Recipe, P], Any]:
    """A flow that ends Failed with one sentence on a DistilError, instead of a traceback.

    `run_name` may have braces with the flow's parameters and `name`, the recipe's. From a deployment the recipe comes
    as plain values. They are checked here and not by Prefect, which answers a rule across fields with a traceback.
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
        given = dict(runtime.flow_run.parameters)
        recipe = given.pop("recipe")  # in one of two forms, so that no name may look into it
        return run_name.format(**given, name=recipe["name"] if isinstance(recipe, dict) else recipe.name).strip()

    bound = flow(
        name=name,
        flow_run_name=named,
        persist_result=False,
        validate_parameters=False,
        # A thread for each task in flight (run.window's bound); they start as they are needed.
        task_runner=cast(TaskRunner[PrefectFuture[Any]], ThreadPoolTaskRunner[Any](max_workers=5000)),
    )(body)
    return cast(Flow[Concatenate[Recipe, P], Any], bound)


def end_with_worker(flow_run: str | None) -> None:
    """Ends this process as SIGTERM does when the worker dies that started it for this flow run.

    Else nobody could cancel it any more. Does nothing where no worker did: in a terminal, in a test, under process 1.
    """
    by_worker = flow_run is not None and os.environ.get("PREFECT__FLOW_RUN_ID") == flow_run
    if sys.platform == "linux" and by_worker and os.getppid() > 1:
        signal.signal(signal.SIGHUP, _left_alone)
        set_parent_death_signal(signal.SIGHUP)


def _left_alone(*_: object) -> None:
    # The kernel says it again for every thread of the worker that ends.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # The worker read our output; a line that cannot be written would end us before we could say how we ended.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    signal.raise_signal(signal.SIGTERM)
