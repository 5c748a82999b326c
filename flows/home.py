"""Local state of one machine: one folder with store/, prefect/, mlflow/ and run/; and what Prefect and MLflow must be
told through the environment before they are imported. Imports neither of them, so the command line starts fast.
"""

import getpass
import json
import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from storage.disk import writing
from storage.store import Store
from tasks.recipe.config import Recipe

TYPED_COMMAND = "DISTIL_RECIPE"
"""Environment variable: recipe file and overrides as the user typed them, for the commands that we tell him."""

REGISTERED = "models:/"
"""How the name of a registered model begins: models:/NAME@ALIAS or models:/NAME/VERSION."""


def open_store(recipe: Recipe) -> Store:
    """The store of a recipe; files of a remote one are cached below the recipe's home."""
    return Store(recipe.store, cache=Path(recipe.home) / "cache", cache_bytes=recipe.run.cache_bytes)


def set_environment(home: str) -> None:
    """Prepares this process and its children for Prefect, MLflow and transformers. Call before importing them.

    What the user has set already is left alone. Nothing is reported to anybody outside. FatalError: the disk is full.
    """
    folder = Path(home)
    with writing(f"the home {folder}"):
        (folder / "prefect").mkdir(parents=True, exist_ok=True)
    quiet = {
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # The tables and sentences of this program are what people read; Prefect's own lines go to its server only.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        # Who calls a flow from Python gets Prefect's embedded server; on two busy cores its 20 seconds are too short.
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
    """Where MLflow records: the recipe's server, else MLFLOW_TRACKING_URI, else the database of this home."""
    return recipe.register_as.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or mlflow_database(recipe.home)


def registry_name(recipe: Recipe) -> str:
    """What names a recipe's MLflow for good, without passwords: the server of a `distil up` is the home's database."""
    uri, up = tracking_uri(recipe), _last_up(recipe.home)
    return _without_userinfo(mlflow_database(recipe.home) if up and uri == up["mlflow"] else uri)


def without_credentials(uri: str) -> str:
    """A URI without the name and password that it may hold, for tables, tags and links.

    Where browsers reach the server of MLFLOW_TRACKING_URI by another address than we do, as between containers, that
    is given as DISTIL_MLFLOW_URL.
    """
    shown = os.environ.get("DISTIL_MLFLOW_URL")
    return shown if shown and uri == os.environ.get("MLFLOW_TRACKING_URI") else _without_userinfo(uri)


def _without_userinfo(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def mlflow_database(home: str) -> str:
    """The database that `distil run` writes to and the server of `distil up` serves: that of MLFLOW_BACKEND_STORE_URI,
    else SQLite below home."""
    return os.environ.get("MLFLOW_BACKEND_STORE_URI") or f"sqlite:///{Path(home).absolute()}/mlflow/mlflow.db"


def user() -> str:
    """Who calls: the name, or the number where the system has no name for it, as in containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


def up_file(home: str) -> Path:
    """Where a `distil up` says where its servers are."""
    return Path(home) / "run" / "up.json"


def _last_up(home: str) -> dict[str, str] | None:
    """What the last `distil up` of this home said, alive or not."""
    try:
        up: dict[str, str] = json.loads(up_file(home).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return up


def link_model(recipe: Recipe, folder: Path) -> Path:
    """A short path to the newest model of a recipe, HOME/models/NAME; a link, so that the store stays the keeper."""
    link = Path(recipe.home) / "models" / recipe.name
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".{recipe.name}-{os.getpid()}")
    fresh.symlink_to(folder, target_is_directory=True)
    fresh.replace(link)
    return link


LOOPBACK = "127.0.0.1"
