"""Small file systems in memory, to fill up and to make read-only; only root may mount one."""

import subprocess
from pathlib import Path

import pytest


def mount(folder: Path, size: str) -> None:
    """Mounts an empty tmpfs of a size such as 128k or 32m at a new folder. Skips where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "distil-test", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")


def remount(folder: Path, options: str) -> None:
    """Changes the size or the mode of a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
