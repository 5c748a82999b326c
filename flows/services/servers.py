"""The servers of this machine: Prefect and MLflow on loopback, with their state below `home`.

    wait = start_server(home)        # for `distil run`: a live `distil up` is used, else a Prefect server is started
    wait()                           # until it answers

Prefect's own embedded server is not used: it outlives a killed parent and writes into our terminal. `start_server`'s
serves the UI while the run lasts, and ends with this process, however that ends. up.py starts both servers to stay.
"""

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from flows.home import LOOPBACK, _last_up, mlflow_database
from flows.services.auth import mlflow_access, prefect_access
from flows.services.process import Service, free_port, is_healthy, start, stop, wait_until_up
from storage.disk import writing
from storage.errors import FatalError
from storage.lock import acquire


def live_up(home: str) -> dict[str, str] | None:
    """The addresses (`prefect_api`, `prefect_ui`, `mlflow`) of the `distil up` that serves this home, or None."""
    up = _last_up(home)
    if up is None:
        return None
    with suppress(PermissionError):  # another user's process is alive as well
        try:
            os.kill(int(up["pid"]), 0)
        except ProcessLookupError:
            return None
    return up if is_healthy(f"{up['prefect_api']}/health") else None


PREFECT_PORT = 4200

MLFLOW_PORT = 5000

LATER = f"http://{LOOPBACK}:{PREFECT_PORT}"
"""Where the runs are seen afterwards, by `distil up`; links to runs say so."""

OWN = "DISTIL_SERVER"
"""Environment variable: the address of the server that `start_server` started, which lasts as long as the run."""

RETENTION = {
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(90 * 24 * 3600),
}
"""What a server of ours is told unless the user says otherwise: to drop runs and their logs after so many seconds, and
events after Prefect's own seven days."""


def start_server(home: str) -> Callable[[], None]:
    """Starts a server unless PREFECT_API_URL names one or a `distil up` of this home is there, and sets that variable.

    Call before Prefect is imported.
    """
    if os.environ.get("PREFECT_API_URL") or join_up(home):
        return lambda: None
    # One after the other: two servers that fill an empty database at the same time spoil it.
    with writing(f"the home {home}"):
        lock = acquire(Path(home) / "run" / "prefect.lock")
    server = prefect_server(home, free_port("Prefect", None))
    # Registered before Prefect's own exit hooks, so it runs after they have sent what they still hold.
    atexit.register(stop, server)
    os.environ["PREFECT_API_URL"] = server.health.removesuffix("/health")
    os.environ[OWN] = server.health.removesuffix("/api/health")
    os.environ.setdefault("PREFECT_UI_URL", LATER)

    def wait() -> None:
        with lock:
            wait_until_up(server)

    return wait


def current_link(link: str) -> str:
    """A link to a page of Prefect as it can be opened while the run lasts.

    The server of a plain `distil run` has any port, but links that are kept name that of a later `distil up`. Those of
    any other server are right as they are: it may well have another address for browsers than for us.
    """
    own = os.environ.get(OWN)
    return own + link.removeprefix(os.environ["PREFECT_UI_URL"].rstrip("/")) if own else link


def join_up(home: str) -> bool:
    """Makes this process a client of the `distil up` that serves this home; False if there is none."""
    up = live_up(home)
    if up is None:
        return False
    os.environ["PREFECT_API_URL"] = up["prefect_api"]
    os.environ["PREFECT_UI_URL"] = up["prefect_ui"]
    os.environ.setdefault("MLFLOW_TRACKING_URI", up["mlflow"])
    return True


def find_server(home: str) -> str:
    """The API of the server in use: PREFECT_API_URL, or that of a live `distil up` of this home; sets that variable.

    FatalError if there is none. Call before Prefect is imported.
    """
    if not os.environ.get("PREFECT_API_URL") and not join_up(home):
        raise FatalError("there is no Prefect server: start `distil up` in another terminal, or set PREFECT_API_URL")
    return os.environ["PREFECT_API_URL"]


def verbose_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a part of Prefect that has a log of its own instead of our terminal: warnings belong there."""
    levels = ("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "PREFECT_SERVER_LOGGING_LEVEL")
    return dict(environment) | dict.fromkeys(levels, "WARNING")


def prefect_server(home: str, port: int) -> Service:
    """Starts a Prefect server: SQLite below home, unless PREFECT_API_DATABASE_CONNECTION_URL names a database."""
    url = f"http://{LOOPBACK}:{port}/api"
    folder = Path(home)
    fixed = {"PREFECT_SERVER_UI_API_URL": url, "PREFECT_UI_STATIC_DIRECTORY": str(folder / "prefect" / "ui")}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port)]
    environment = RETENTION | verbose_environment(os.environ) | fixed | prefect_access()
    return start("prefect", command, folder / "run", environment, health=f"{url}/health")


def mlflow_server(home: str, port: int) -> Service:
    """Starts an MLflow server: the database that a plain `distil run` writes to, unless MLFLOW_BACKEND_STORE_URI
    names another, and the same folder of artifacts."""
    folder = Path(home) / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    artifacts = (folder / "artifacts").absolute().as_uri()
    kept = {
        # Not on the command line, which every user of the machine can read: the URI may hold a password.
        "MLFLOW_BACKEND_STORE_URI": mlflow_database(home),
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": artifacts,
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
        # Evaluation jobs of language-model applications: nobody here needs their processes.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    access = mlflow_access(home)
    command = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    command += ["--app-name", "basic-auth"] if access else []
    environment = kept | os.environ | access
    return start("mlflow", command, Path(home) / "run", environment, health=f"http://{LOOPBACK}:{port}/health")
