"""Memory that the trainer frees stays with its process, measured as resident memory after a large array is freed."""

import subprocess
import sys

import pytest

ARRAY_BYTES = 400_000_000
FREE_AN_ARRAY = f"""
from pathlib import Path
from tasks.train.process import keep_freed_memory
import numpy as np

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if {{keep}}:
    keep_freed_memory()
before = resident()
np.ones({ARRAY_BYTES} // 8)
print(resident() - before)
"""


def bytes_kept(keep: bool) -> int:
    code = FREE_AN_ARRAY.format(keep=keep)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is a call of glibc")
def test_freed_memory_stays_with_the_process() -> None:
    assert bytes_kept(keep=True) > 0.9 * ARRAY_BYTES
    assert bytes_kept(keep=False) < 0.1 * ARRAY_BYTES
