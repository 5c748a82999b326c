"""Has the C library keep freed memory for the next step, instead of giving it back to the kernel.

A step on a CPU frees hundreds of megabytes that the next one takes again. glibc maps each such block anew by default,
and the kernel clears every page: a fifth of a training's time went there, and keeping them costs 2 % of its peak
(tests/benchmarks/results/PROFILE.md).

    keep_freed_memory()      # first thing in a trainer
"""

import ctypes
import sys

TRIM_THRESHOLD = -1
"""Parameter of mallopt(3): from so many free bytes on, the top of the heap goes back; -1 is never."""
MMAP_MAX = -4
"""Parameter of mallopt(3): so many blocks may be mapped apart from the heap; 0 is none."""


def keep_freed_memory() -> None:
    """For this process, and not for its children. Does nothing where the C library is not glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(MMAP_MAX, 0)
