"""The most memory that this process had resident at once.

    peak_megabytes()

Not by `getrusage` on Linux: there a process begins with the peak of the one that started it, however small it is.
"""

import resource
import sys
from pathlib import Path


def peak_megabytes() -> float:
    """Megabytes of 10^6 bytes since the process began its program."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
