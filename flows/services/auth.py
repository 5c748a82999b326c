"""Authentication of the Prefect and MLflow servers, turned on by the variables that their clients read.

    environment = os.environ | prefect_access() | mlflow_access(home)       # of the servers
    check_mlflow(url, home)                                                 # after its start

PREFECT_API_AUTH_STRING turns it on in Prefect, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in MLflow. Secrets
are passed by environment only; the one secret in a file is the random key that signs MLflow's forms.
"""

import base64
import os
import secrets
import stat
import urllib.error
import urllib.request
from pathlib import Path

from storage.errors import FatalError

LEAST_CHARACTERS = 12
"""Minimum length of a password, a rule of MLflow."""

PRIVATE = stat.S_IRUSR | stat.S_IWUSR
"""File mode 0600."""


def prefect_access() -> dict[str, str]:
    """Variables for the Prefect server: the secret that its clients send, or none."""
    secret = os.environ.get("PREFECT_API_AUTH_STRING", "")
    return {"PREFECT_SERVER_API_AUTH_STRING": secret} if secret else {}


def mlflow_access(home: str) -> dict[str, str]:
    """Variables for the MLflow server: its administrator's name and password and its own files, or none.

    FatalError if only one of name and password is set, or the password is too short.
    """
    name = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if not name and not password:
        return {}
    if not name or not password:
        absent = "MLFLOW_TRACKING_PASSWORD" if name else "MLFLOW_TRACKING_USERNAME"
        raise FatalError(f"{absent} is not set; MLflow needs MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    if len(password) < LEAST_CHARACTERS:
        raise FatalError(f"MLFLOW_TRACKING_PASSWORD is too short; MLflow needs {LEAST_CHARACTERS} characters or more")
    folder = Path(home) / "mlflow"
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(_config(folder)),
        "MLFLOW_AUTH_ADMIN_USERNAME": name,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": _form_key(folder),
    }


def check_mlflow(url: str, home: str) -> None:
    """FatalError if the running server refuses our name and password: it keeps those of its first start."""
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
        "MLflow refuses MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: it knows those of its first start; "
        f"give those, or delete {Path(home) / 'mlflow' / 'auth.db'}, which holds its users and nothing else"
    )


def _config(folder: Path) -> Path:
    """Writes MLflow's authentication settings; its user database is in the same folder, not in the working folder."""
    users = folder.absolute() / "auth.db"
    if not users.exists():
        _write(users, "")  # created here, since MLflow would make it readable for all users
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
    """The random key that signs MLflow's forms, the same at every start."""
    path = folder / "form.key"
    if not path.exists():
        _write(path, secrets.token_hex(32))
    return path.read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    """Writes a file that only its owner can read and write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE), "w", encoding="utf-8") as file:
        file.write(text)
