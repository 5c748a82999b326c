"""Starts or finds the Prefect and MLflow servers of this machine. They use loopback and keep their state below `home`.

    wait = start_server(home)        # for `distil run`: uses a live `distil up`, else starts a Prefect server
    wait()                           # until the server responds

The server of `start_server` serves the UI during the run and ends with this process; up.py starts both servers for
longer. Prefect's embedded server is not used, since it outlives a killed parent and writes to the user's terminal.
"""

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from flows.home import LOOPBACK, last_up, mlflow_database
from flows.services.auth import mlflow_access, prefect_access
from flows.services.process import Service, free_port, is_healthy, start, stop, wait_until_up
from storage.errors import FatalError
from storage.files.disk import writing
from storage.files.lock import acquire


def live_up(home: str) -> dict[str, str] | None:
    """Returns the addresses (`prefect_api`, `prefect_ui`, `mlflow`) of a live `distil up` of this home, or None."""
    up = last_up(home)
    if up is None:
        return None
    with suppress(PermissionError):  # the process belongs to another user, so it is alive
        try:
            os.kill(int(up["pid"]), 0)
        except ProcessLookupError:
            return None
    return up if is_healthy(f"{up['prefect_api']}/health") else None


PREFECT_PORT = 4200

MLFLOW_PORT = 5000

DEFAULT_PREFECT_UI = f"http://{LOOPBACK}:{PREFECT_PORT}"
"""Address of the UI of a later `distil up`. Stored links to runs begin with it."""

RUN_SERVER = "DISTIL_SERVER"
"""Environment variable with the address of the server that `start_server` started. It ends with the run."""

RETENTION = {
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(90 * 24 * 3600),
}
"""Default retention in our Prefect servers: 90 days (in seconds) for runs and logs. Events have Prefect's 7 days."""


def start_server(home: str) -> Callable[[], None]:
    """Starts a Prefect server and sets PREFECT_API_URL, unless it is set or a `distil up` serves this home.

    Returns a function that waits until the server responds. Call it before Prefect is imported.
    """
    if os.environ.get("PREFECT_API_URL") or join_up(home):
        return lambda: None
    # The lock prevents two servers from creating the same database at the same time, which would corrupt it.
    with writing(f"the home {home}"):
        lock = acquire(Path(home) / "run" / "prefect.lock")
    server = prefect_server(home, free_port("Prefect", None))
    # Registered before Prefect's own exit hooks, so it runs after they have sent the last logs and events.
    atexit.register(stop, server)
    os.environ["PREFECT_API_URL"] = server.health.removesuffix("/health")
    os.environ[RUN_SERVER] = server.health.removesuffix("/api/health")
    os.environ.setdefault("PREFECT_UI_URL", DEFAULT_PREFECT_UI)

    def wait() -> None:
        with lock:
            wait_until_up(server)

    return wait


def current_link(link: str) -> str:
    """Changes a stored link to a page of Prefect so that it works during this run, and returns it.

    The server of a plain `distil run` uses any free port, while stored links contain the port of a later `distil up`.
    Links to other servers are returned unchanged.
    """
    server = os.environ.get(RUN_SERVER)
    return server + link.removeprefix(os.environ["PREFECT_UI_URL"].rstrip("/")) if server else link


def join_up(home: str) -> bool:
    """Makes this process a client of the live `distil up` of this home. Returns False if there is none, else True."""
    up = live_up(home)
    if up is None:
        return False
    os.environ["PREFECT_API_URL"] = up["prefect_api"]
    os.environ["PREFECT_UI_URL"] = up["prefect_ui"]
    os.environ.setdefault("MLFLOW_TRACKING_URI", up["mlflow"])
    return True


def find_server(home: str) -> str:
    """Sets PREFECT_API_URL to that of a live `distil up` of this home unless it is set, and returns it.

    FatalError if no server is known. Call it before Prefect is imported.
    """
    if not os.environ.get("PREFECT_API_URL") and not join_up(home):
        raise FatalError("no Prefect server was found; start `distil up` in another terminal, or set PREFECT_API_URL")
    return os.environ["PREFECT_API_URL"]


def verbose_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a Prefect process that writes to a log file: warnings are logged, too."""
    levels = ("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "PREFECT_SERVER_LOGGING_LEVEL")
    return dict(environment) | dict.fromkeys(levels, "WARNING")


def prefect_server(home: str, port: int) -> Service:
    """Starts a Prefect server with the database of PREFECT_API_DATABASE_CONNECTION_URL, or with SQLite below `home`."""
    url = f"http://{LOOPBACK}:{port}/api"
    folder = Path(home)
    fixed = {"PREFECT_SERVER_UI_API_URL": url, "PREFECT_UI_STATIC_DIRECTORY": str(folder / "prefect" / "ui")}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port)]
    environment = RETENTION | verbose_environment(os.environ) | fixed | prefect_access()
    return start("prefect", command, folder / "run", environment, health=f"{url}/health")


def mlflow_server(home: str, port: int) -> Service:
    """Starts an MLflow server with the database and the artifacts folder that a plain `distil run` writes to.

    MLFLOW_BACKEND_STORE_URI can set a different database.
    """
    folder = Path(home) / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    artifacts = (folder / "artifacts").absolute().as_uri()
    settings = {
        # Not on the command line, which every user of the machine can read, since the URI may contain a password.
        "MLFLOW_BACKEND_STORE_URI": mlflow_database(home),
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": artifacts,
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
        # No processes for evaluation jobs of LLM applications, which this project does not use.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    access = mlflow_access(home)
    command = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    command += ["--app-name", "basic-auth"] if access else []
    environment = settings | os.environ | access
    return start("mlflow", command, Path(home) / "run", environment, health=f"http://{LOOPBACK}:{port}/health")
