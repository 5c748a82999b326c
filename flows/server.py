"""A Prefect server of our own for a run on one machine where none is running: `distil run` needs nothing beside it.

    wait = start_server(home)        # returns at once; the server starts while heavy modules are imported
    wait()                           # until it answers

Prefect's own embedded server is not used: it outlives a killed parent and writes into our terminal. This one has its
state below `home`, serves the UI while the run lasts, and ends with this process, however that ends.
"""

import atexit
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from flows.launch import end_with_parent
from storage.error import FatalError

LATER = "http://127.0.0.1:4200"
"""Where the runs are seen afterwards, by `prefect server start`; links to runs say so."""
START_SECONDS = 180.0
"""On two cores that also compute, starting takes up to half a minute."""


def start_server(home: str) -> Callable[[], None]:
    """Starts a server unless PREFECT_API_URL names one, and sets that variable. Call before Prefect is imported."""
    if os.environ.get("PREFECT_API_URL"):
        return lambda: None
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    folder = Path(home) / "run"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "prefect.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Prefect reads a project file in the working folder; its home is safe ground.
            cwd=folder,
            env=os.environ
            | {
                "PREFECT_SERVER_UI_API_URL": url,
                "PREFECT_UI_STATIC_DIRECTORY": str(Path(home) / "prefect" / "ui"),
            },
            # A session of its own: Ctrl-C is for the run, which still has states to report.
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )
    # Registered before Prefect's own exit hooks, so it runs after they have sent what they still hold.
    atexit.register(_stop, process)
    os.environ["PREFECT_API_URL"] = url
    os.environ.setdefault("PREFECT_UI_URL", LATER)
    return lambda: _wait(process, url, log)


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Returns when the server answers. FatalError if it ends or takes too long."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise FatalError(f"the Prefect server did not start; see {log}, or start one and set PREFECT_API_URL", str(log))


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
