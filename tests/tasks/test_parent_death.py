"""Processes that end when their parent is killed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a parent-death signal")

PARENT_OF_A_COMMAND = """
import subprocess, sys, time
from tasks.parent_death import signal_on_parent_death
child = subprocess.Popen(["sleep", "600"], start_new_session=True, preexec_fn=signal_on_parent_death())
print(child.pid, flush=True)
time.sleep(600)
"""

PARENT_OF_A_FORK = """
import os, signal, sys, time
from tasks.parent_death import set_parent_death_signal
parent = os.getpid()
if os.fork() == 0:
    os.setsid()
    set_parent_death_signal(signal.SIGKILL, parent)
    print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("code", [PARENT_OF_A_COMMAND, PARENT_OF_A_FORK])
def test_a_child_ends_when_its_parent_is_killed(code: str, repo: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=repo)
    assert parent.stdout is not None
    child = Path("/proc") / parent.stdout.readline().strip()
    assert child.exists()
    parent.kill()
    parent.wait()
    wait_until_ended(child)


def test_a_child_whose_parent_died_before_the_request_exits(repo: Path) -> None:
    code = "from tasks.parent_death import set_parent_death_signal; set_parent_death_signal(15, parent=1)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo, check=False).returncode == 1


def test_nothing_heavy_is_imported(repo: Path) -> None:
    code = "import sys, tasks.parent_death; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=repo, check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def wait_until_ended(process: Path) -> None:
    """Waits until a process is gone, or is a zombie without a waiting parent."""
    end = time.monotonic() + 60
    while process.exists() and (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, f"{process} still runs after a minute"
        time.sleep(0.05)
