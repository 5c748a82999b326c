"""Local state of one machine: a folder (`home`) with store/, prefect/, mlflow/ and run/, and the environment variables
that Prefect and MLflow read when they are imported.

    set_environment(recipe.home)            # before the first import of Prefect or MLflow
    workspace = open_workspace(recipe)

Imports neither of them, so the command line starts fast.
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
    """The store of a recipe; files of a remote one are cached below the recipe's home."""
    return Store(recipe.store, cache=Path(recipe.home) / "cache", cache_bytes=recipe.run.cache_bytes)


def open_workspace(recipe: Recipe) -> "Workspace":
    """The recipe together with its store."""
    from tasks.lineage import Workspace  # deferred: `distil up` runs for days and never needs it

    return Workspace(open_store(recipe), recipe)


def set_environment(home: str) -> None:
    """Prepares this process and its children for Prefect, MLflow and transformers. Call before importing them.

    Variables that are already set stay. Telemetry is off. FatalError: the disk is full.
    """
    folder = Path(home)
    with writing(f"the home {folder}"):
        (folder / "prefect").mkdir(parents=True, exist_ok=True)
    quiet = {
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Users read the tables and sentences of this program; Prefect's own log lines go to its server only.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        # A flow called from Python starts Prefect's embedded server; on two busy cores 20 s are too short.
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
        # A proxy of the user's network cannot reach the servers of this machine.
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [around, LOOPBACK, "localhost"]))


def tracking_uri(recipe: Recipe) -> str:
    """The MLflow to record in: the recipe's server, else MLFLOW_TRACKING_URI, else the database of this home."""
    return recipe.register_as.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or mlflow_database(recipe.home)


def registry_name(recipe: Recipe) -> str:
    """Stable name of a recipe's MLflow, without passwords: the server of `distil up` counts as the home's database."""
    uri, up = tracking_uri(recipe), _last_up(recipe.home)
    return _without_userinfo(mlflow_database(recipe.home) if up and uri == up["mlflow"] else uri)


def without_credentials(uri: str) -> str:
    """A URI without user name and password, for tables, tags and links.

    DISTIL_MLFLOW_URL replaces MLFLOW_TRACKING_URI where browsers reach that server by another address, as with
    containers.
    """
    shown = os.environ.get("DISTIL_MLFLOW_URL")
    return shown if shown and uri == os.environ.get("MLFLOW_TRACKING_URI") else _without_userinfo(uri)


def _without_userinfo(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def mlflow_database(home: str) -> str:
    """The database that `distil run` writes to and `distil up` serves: MLFLOW_BACKEND_STORE_URI, else SQLite in the
    home."""
    return os.environ.get("MLFLOW_BACKEND_STORE_URI") or f"sqlite:///{Path(home).absolute()}/mlflow/mlflow.db"


def user() -> str:
    """The user's name, or number where the system has no name for it, as in containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


def up_file(home: str) -> Path:
    """The file in which `distil up` stores the addresses of its servers."""
    return Path(home) / "run" / "up.json"


def _last_up(home: str) -> dict[str, str] | None:
    """The addresses that the last `distil up` of this home stored; it may have ended since."""
    try:
        up: dict[str, str] = json.loads(up_file(home).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return up


def link_model(recipe: Recipe, folder: Path) -> Path:
    """Links HOME/models/NAME to the newest model of a recipe, which stays in the store; returns the link."""
    link = Path(recipe.home) / "models" / recipe.name
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".{recipe.name}-{os.getpid()}")
    fresh.symlink_to(folder, target_is_directory=True)
    fresh.replace(link)
    return link


LOOPBACK = "127.0.0.1"
