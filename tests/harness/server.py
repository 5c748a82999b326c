"""A Prefect server and a worker of their own for tests, on a free loopback port.

with serving(folder) as api, working(folder / "worker", api, "distil"):
    …
"""

import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.harness.place import environment, running

START_SECONDS = 180.0


@contextmanager
def serving(folder: Path, more: Mapping[str, str] | None = None) -> Iterator[str]:
    """The API URL of a server whose state and log lie in `folder`; `more` are variables of its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    settings = {
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_UI_URL": url.removesuffix("/api"),  # links in notifications
        "DO_NOT_TRACK": "1",
    }
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with running(command, folder, environment(folder) | settings | dict(more or {})) as process:
        end = time.monotonic() + START_SECONDS
        while not answers(f"{url}/health"):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, "the Prefect server does not answer"
            time.sleep(0.1)
        yield url


@contextmanager
def working(folder: Path, api: str, pool: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process worker that starts in an empty folder and looks for runs every second."""
    variables = environment(folder, api) | {"PREFECT_WORKER_QUERY_SECONDS": "1"}
    with running(["prefect", "worker", "start", "--pool", pool, "--type", "process"], folder, variables) as process:
        yield process


def answers(url: str) -> bool:
    """True if something answers there."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
