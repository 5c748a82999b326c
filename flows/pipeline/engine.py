"""Who makes a recipe's artifacts: worker processes here, this process, or Ray; `run.engine` says which.

with text_pool(recipe) as pool:         # shards and blocks
with teacher_pool(recipe) as pool:      # calibration and targets
    pool.call(3600, make_blocks, store, shard, ...)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from flows.pipeline.process_pool import Pool, workers
from tasks.recipe.config import Recipe

R = TypeVar("R")


@contextmanager
def text_pool(recipe: Recipe) -> Iterator[Pool]:
    """For work on CPUs: outside this process, and a time-out ends what hangs."""
    if recipe.run.engine == "ray":
        from flows.pipeline.ray_pool import ray_workers

        with ray_workers(recipe.ray, recipe.run.window) as tasks:
            yield tasks
    else:
        with workers(recipe.run) as processes:
            yield processes


@contextmanager
def teacher_pool(recipe: Recipe) -> Iterator[Pool]:
    """For work with the teacher, which every process loads once: the cluster's, or this one with its GPU."""
    if recipe.run.engine == "ray":
        from flows.pipeline.ray_pool import ray_workers

        with ray_workers(recipe.ray, recipe.run.window, teacher=True) as tasks:
            yield tasks
    else:
        yield _InProcess()


class _InProcess:
    """A `Pool` that is this process: no time-out, and one call at a time is best."""

    is_here = True
    width = 1

    def call(self, timeout: float, fn: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """`fn(*args, **kwargs)`."""
        return fn(*args, **kwargs)
