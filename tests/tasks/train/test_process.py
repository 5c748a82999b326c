"""Memory that the trainer frees stays with its process, measured as resident memory after a large array is freed."""

import json
import subprocess
import sys

import pytest

ARRAY_BYTES = 400_000_000
FREE_TWO_ARRAYS = f"""
import resource
from pathlib import Path
from tasks.train.process import keep_freed_memory
import numpy as np

def bytes_kept() -> int:
    pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])
    before = pages()
    np.ones({ARRAY_BYTES} // 8)
    return (pages() - before) * resource.getpagesize()

returned = bytes_kept()
keep_freed_memory()
print([returned, bytes_kept()])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is a call of glibc")
def test_freed_memory_stays_with_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", FREE_TWO_ARRAYS], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert before < 0.1 * ARRAY_BYTES
    assert after > 0.9 * ARRAY_BYTES
