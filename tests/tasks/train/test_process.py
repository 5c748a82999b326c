"""What a process frees stays with it, counted by the pages that the kernel hands out."""

import subprocess
import sys

import pytest

BLOCKS = """
import resource
from tasks.train.process import keep_freed_memory
import numpy as np
if {keep}:
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(5_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(keep: bool) -> int:
    code = BLOCKS.format(keep=keep)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told")
def test_a_block_that_was_freed_is_used_again() -> None:
    assert pages(keep=True) < pages(keep=False) / 4
