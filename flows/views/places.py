"""Where people look after a run: the store, the servers or what starts them, the model.

places(recipe, folder, mlflow_uri, command)     # rows of the final table, true on this machine at this time
"""

import os
import shlex
from pathlib import Path

from flows.home import without_credentials
from flows.views.tables import Rows
from tasks.recipe.config import Recipe

MADE, MODEL = "Made", "model"
"""Heading and name of the row that has the folder of the model."""

LOOK = "Where to look"
"""Heading of the rows that `places` gives."""


def places(recipe: Recipe, model_folder: Path, mlflow_uri: str, command: str = "") -> Rows:
    """Rows of (what, where). `command` is the recipe file and settings as typed, where there are any."""
    seen = [("curves, models and runs", f"distil up --home {shlex.quote(recipe.home)}")]
    if mlflow_uri.startswith("http"):  # else a database, which has no page of its own
        seen = [("curves and models", without_credentials(mlflow_uri)), ("runs", os.environ.get("PREFECT_UI_URL", ""))]
    return [
        ("store", recipe.store),
        *seen,
        ("the model", f"pipeline('fill-mask', model='{model_folder}')"),
        ("what is there", f"distil status {command or 'RECIPE.toml'}"),
    ]
