"""Local state of one machine: one folder with store/, prefect/, mlflow/ and run/; and what Prefect and MLflow must be
told through the environment before they are imported. Imports neither of them, so the command line starts fast.
"""

import os
from pathlib import Path

from storage.store import Store
from tasks.config import Recipe

HOME = ".distil"
"""The default folder, below the current one."""


def settled(recipe: Recipe) -> Recipe:
    """The recipe with its folders filled in, as when it comes from the Prefect form with both left empty."""
    home = str(Path(recipe.home or HOME).absolute())
    return recipe.model_copy(update={"home": home, "store": recipe.store or f"{home}/store"})


def open_store(recipe: Recipe) -> Store:
    """The store of a recipe; files of a remote one are cached below the recipe's home."""
    return Store(recipe.store, cache=Path(recipe.home) / "cache")


def set_environment(home: str) -> None:
    """Prepares this process and its children for Prefect, MLflow and transformers. Call before importing them.

    What the user has set already is left alone. Nothing is reported to anybody outside.
    """
    folder = Path(home)
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
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not os.environ.get("PREFECT_API_URL"):
        quiet["PREFECT_HOME"] = str(folder / "prefect")
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def tracking_uri(recipe: Recipe) -> str:
    """Where MLflow records: the recipe's server, else MLFLOW_TRACKING_URI, else a database below the recipe's home."""
    local = f"sqlite:///{Path(recipe.home).absolute()}/mlflow/mlflow.db"
    return recipe.register_as.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local


def link_model(recipe: Recipe, folder: Path) -> Path:
    """A short path to the newest model of a recipe, HOME/models/NAME; a link, so that the store stays the keeper."""
    link = Path(recipe.home) / "models" / recipe.name
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".{recipe.name}-{os.getpid()}")
    fresh.symlink_to(folder, target_is_directory=True)
    fresh.replace(link)
    return link
