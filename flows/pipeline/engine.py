"""Chooses where a recipe's artifacts are made: local worker processes, this process, or Ray (`run.engine`).

with text_pool(recipe) as pool:         # shards and blocks
    pool.call(3600, make_blocks, store, shard, ...)
with teacher_pool(recipe) as pool:      # calibration and targets
    pool.call(3600, with_capture, calibrate, ...)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from flows.pipeline.process_pool import Pool, workers
from tasks.recipe.config import Recipe

R = TypeVar("R")


@contextmanager
def text_pool(recipe: Recipe) -> Iterator[Pool]:
    """Yields the pool for work on CPUs. It runs calls in other processes, and kills them at the time-out of a call."""
    if recipe.run.engine == "ray":
        from flows.pipeline.ray_pool import ray_workers

        with ray_workers(recipe.ray, recipe.run.window) as tasks:
            yield tasks
    else:
        with workers(recipe.run) as processes:
            yield processes


@contextmanager
def teacher_pool(recipe: Recipe) -> Iterator[Pool]:
    """Yields the pool for work with the teacher: Ray tasks, or this process. Each process loads the teacher once."""
    if recipe.run.engine == "ray":
        from flows.pipeline.ray_pool import ray_workers

        with ray_workers(recipe.ray, recipe.run.window, teacher=True) as tasks:
            yield tasks
    else:
        yield _InProcess()


class _InProcess:
    """A `Pool` that runs one call at a time in this process, without a time-out."""

    is_here = True
    width = 1

    def call(self, timeout: float, fn: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Returns `fn(*args, **kwargs)`."""
        return fn(*args, **kwargs)
