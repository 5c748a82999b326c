"""Mounts small in-memory file systems that tests can fill or make read-only; only root may mount them."""

import subprocess
from pathlib import Path

import pytest


def mount(folder: Path, size: str) -> None:
    """Mounts an empty tmpfs of a size such as 128k or 32m at a new folder. Skips the test if that is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "distil-test", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted ({done.stderr.strip()}); run the test as root")


def remount(folder: Path, options: str) -> None:
    """Changes the size or the mode of a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
