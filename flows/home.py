"""Defines the local state of one machine: the folder `home` with store/, prefect/, mlflow/ and run/, and the
environment variables that Prefect and MLflow read when they are imported.

    set_environment(recipe.home)            # before the first import of Prefect or MLflow
    workspace = open_workspace(recipe)

Imports neither Prefect nor MLflow, so that the command line starts fast.
"""

import getpass
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from storage.files.disk import writing
from storage.store import Store
from tasks.recipe.config import Recipe

if TYPE_CHECKING:
    from tasks.lineage import Workspace

REGISTERED = "models:/"
"""Prefix of a registered model: models:/NAME@ALIAS or models:/NAME/VERSION."""


def open_store(recipe: Recipe) -> Store:
    """Opens the store of a recipe. Files of a remote store are cached below the recipe's home."""
    return Store(recipe.store, cache=Path(recipe.home) / "cache", cache_bytes=recipe.run.cache_bytes)


def open_workspace(recipe: Recipe) -> "Workspace":
    """Opens the store of a recipe and returns both as a workspace."""
    from tasks.lineage import Workspace  # deferred: `distil up` runs for days and never needs it

    return Workspace(open_store(recipe), recipe)


def set_environment(home: str) -> None:
    """Sets the variables that Prefect, MLflow and transformers read, for this process and its children.

    Call it before importing any of them. Variables that are already set keep their values. Telemetry is turned off.
    FatalError: the disk is full.
    """
    folder = Path(home)
    with writing(f"the home {folder}"):
        (folder / "prefect").mkdir(parents=True, exist_ok=True)
    quiet = {
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # The terminal shows only this program's tables and messages; Prefect's log lines are sent to its server.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        # A flow called from Python starts Prefect's embedded server; the default of 20 s is too short on busy cores.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not os.environ.get("PREFECT_API_URL"):
        quiet["PREFECT_HOME"] = str(folder / "prefect")
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    around = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if getproxies_environment() and not proxy_bypass_environment(LOOPBACK):
        # A proxy of the user's network cannot reach servers on the loopback interface.
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [around, LOOPBACK, "localhost"]))


def tracking_uri(recipe: Recipe) -> str:
    """Returns the URI of the recipe's MLflow: its own setting, else MLFLOW_TRACKING_URI, else its home's database."""
    return recipe.register_as.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or mlflow_database(recipe.home)


def registry_name(recipe: Recipe) -> str:
    """Returns a stable name of a recipe's MLflow without credentials.

    The MLflow server of `distil up` has the name of the database that it serves.
    """
    uri, up = tracking_uri(recipe), last_up(recipe.home)
    return _without_userinfo(mlflow_database(recipe.home) if up and uri == up["mlflow"] else uri)


def without_credentials(uri: str) -> str:
    """Returns a URI without user name and password, for tables, tags and links.

    If DISTIL_MLFLOW_URL is set, it replaces MLFLOW_TRACKING_URI: with containers, browsers reach the server at a
    different address.
    """
    shown = os.environ.get("DISTIL_MLFLOW_URL")
    return shown if shown and uri == os.environ.get("MLFLOW_TRACKING_URI") else _without_userinfo(uri)


def _without_userinfo(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def mlflow_database(home: str) -> str:
    """Returns the URI of the database that `distil run` writes to and `distil up` serves.

    It is MLFLOW_BACKEND_STORE_URI if set, else a SQLite file in the home.
    """
    return os.environ.get("MLFLOW_BACKEND_STORE_URI") or f"sqlite:///{Path(home).absolute()}/mlflow/mlflow.db"


def user() -> str:
    """Returns the user's name, or the user id if the system has no name for it, as in containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


def up_file(home: str) -> Path:
    """Returns the path of the file in which `distil up` stores the addresses of its servers."""
    return Path(home) / "run" / "up.json"


def last_up(home: str) -> dict[str, str] | None:
    """Returns the addresses that the last `distil up` of this home stored, or None. That process may have ended."""
    try:
        up: dict[str, str] = json.loads(up_file(home).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return up


def link_model(recipe: Recipe, folder: Path) -> Path:
    """Links HOME/models/NAME to the model folder of a recipe in the store, and returns the link."""
    link = Path(recipe.home) / "models" / recipe.name
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".{recipe.name}-{os.getpid()}")
    fresh.symlink_to(folder, target_is_directory=True)
    fresh.replace(link)
    return link


LOOPBACK = "127.0.0.1"
