"""Profiles a few steps of a training and appends the table of their kernels to profile.txt.

    with profiled_steps(context, "cached masked", first=43, count=3):
        run_training(...)

Used by the training cases of 256 blocks per step; metrics of the profiled steps are not counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from tasks.train import step, trainer
from tests.benchmarks.gpu.context import Context

PROFILE_FILE = "profile.txt"
ROWS = 45
"""Rows of the table, by time on the device."""


@contextmanager
def profiled_steps(context: Context, title: str, first: int, count: int) -> Iterator[None]:
    """Profiles steps `first` to `first + count - 1` (1-based) of the training inside, and writes the table at its end.

    A step begins with the trainer's call of gradient_step. RuntimeError where the training ends before the last one.
    """
    activities = [ProfilerActivity.CPU] if context.tiny else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    profiler = profile(activities=activities)
    gradient_step, calls = step.gradient_step, 0

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == first:
            profiler.start()
        elif calls == first + count:
            if not context.tiny:
                torch.cuda.synchronize()
            profiler.stop()
        return gradient_step(*arguments, **named)

    with patch.object(trainer, "gradient_step", counting):
        yield
    if calls < first + count:
        raise RuntimeError(f"the training made {calls} steps; profiling ends with step {first + count}")
    order = "self_cpu_time_total" if context.tiny else "self_device_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=90)
    with (context.out / PROFILE_FILE).open("a", encoding="utf-8") as file:
        file.write(f"\n==== {title}: {count} steps\n{table}\n")
