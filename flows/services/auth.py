"""Configures authentication in the Prefect and MLflow servers from the variables that their clients read.

    environment = os.environ | prefect_access() | mlflow_access(home)       # environment of the servers
    check_mlflow(url, home)                                                 # after the start of the MLflow server

PREFECT_API_AUTH_STRING turns it on in Prefect, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in MLflow. Secrets
are passed only in the environment, except the random key that signs MLflow's forms, which is stored in a file.
"""

import base64
import os
import secrets
import stat
import urllib.error
import urllib.request
from pathlib import Path

from storage.errors import FatalError

MIN_CHARACTERS = 12
"""Minimum length of a password, set by MLflow."""

PRIVATE = stat.S_IRUSR | stat.S_IWUSR
"""File mode 0600."""


def prefect_access() -> dict[str, str]:
    """Returns the variables of the Prefect server: the secret that its clients send, or none if it is not set."""
    secret = os.environ.get("PREFECT_API_AUTH_STRING", "")
    return {"PREFECT_SERVER_API_AUTH_STRING": secret} if secret else {}


def mlflow_access(home: str) -> dict[str, str]:
    """Returns the variables of the MLflow server: the administrator's name and password and the paths of its files.

    Returns none if neither name nor password is set. FatalError if only one of them is set, or if the password is too
    short.
    """
    name = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if not name and not password:
        return {}
    if not name or not password:
        absent = "MLFLOW_TRACKING_PASSWORD" if name else "MLFLOW_TRACKING_USERNAME"
        raise FatalError(f"{absent} is not set; set both MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    if len(password) < MIN_CHARACTERS:
        raise FatalError(f"MLFLOW_TRACKING_PASSWORD is too short; MLflow requires at least {MIN_CHARACTERS} characters")
    folder = Path(home) / "mlflow"
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(_config(folder)),
        "MLFLOW_AUTH_ADMIN_USERNAME": name,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": _form_key(folder),
    }


def check_mlflow(url: str, home: str) -> None:
    """FatalError if the running server rejects our name and password. It keeps the credentials of its first start."""
    name, password = os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if not name:
        return
    credentials = base64.b64encode(f"{name}:{password}".encode()).decode()
    page = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        with urllib.request.urlopen(urllib.request.Request(page, headers={"Authorization": f"Basic {credentials}"})):
            return
    except urllib.error.HTTPError as error:
        error.close()
        if error.code not in (401, 403):
            raise
    raise FatalError(
        "MLflow rejects MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD because it has those of its first start; "
        f"set the earlier ones, or delete {Path(home) / 'mlflow' / 'auth.db'}, which contains only MLflow's users"
    )


def _config(folder: Path) -> Path:
    """Writes MLflow's authentication settings and an empty user database to `folder`; returns the settings file."""
    users = folder.absolute() / "auth.db"
    if not users.exists():
        _write(users, "")  # created here, since MLflow would make it readable by all users of the machine
    database = str(users).replace("%", "%%")
    lines = (
        "[mlflow]",
        "default_permission = READ",
        f"database_uri = sqlite:///{database}",
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
    )
    path = folder / "auth.ini"
    _write(path, "\n".join(lines) + "\n")
    return path


def _form_key(folder: Path) -> str:
    """Returns the random key that signs MLflow's forms. It is created at the first start and stored in `folder`."""
    path = folder / "form.key"
    if not path.exists():
        _write(path, secrets.token_hex(32))
    return path.read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    """Writes a file that only its owner can read or write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE), "w", encoding="utf-8") as file:
        file.write(text)
