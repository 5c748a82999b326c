"""Times repeated work on a device.

    seconds = median_seconds(lambda: left @ right, "cuda")

On a GPU by CUDA events, which leave out the launch overhead of the first call; on a CPU by the wall clock.
"""

import time
from collections.abc import Callable

import torch


def median_seconds(work: Callable[[], object], device: str, repeats: int = 10, warm_up: int = 3) -> float:
    """Median seconds of one call. On a CPU a single call, since there it only shows that the work runs."""
    if device != "cuda":
        work()
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    for _ in range(warm_up):
        work()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]  # type: ignore[no-untyped-call]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return float(sorted(begin.elapsed_time(end) for begin, end in events)[repeats // 2] / 1e3)
