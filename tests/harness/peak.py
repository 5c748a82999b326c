"""Measures the peak resident memory of this process.

    peak_megabytes()

Linux is not measured by `getrusage`, because there a process inherits the peak of the process that started it.
"""

import resource
import sys
from pathlib import Path


def peak_megabytes() -> float:
    """Returns the peak resident memory since the program started, in units of 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
