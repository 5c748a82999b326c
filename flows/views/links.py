"""Makes the rows of the final table that locate the store, the servers (or the command that starts them) and the model.

places(recipe, folder, mlflow_uri, command)     # the current addresses of this machine
"""

import os
import shlex
from pathlib import Path

from flows.home import without_credentials
from flows.views.tables import Rows
from tasks.recipe.config import Recipe

MADE, MODEL = "Made", "model"
"""Heading and name of the row with the folder of the model. Notes in the store contain both."""

WHERE = "Where to find it"
"""Heading of the rows of `places`."""


def location_rows(recipe: Recipe, model_folder: Path, mlflow_uri: str, command: str = "") -> Rows:
    """Returns rows of names and addresses.

    `command` is the recipe file and settings as typed, or "" for a run of a deployment.
    """
    seen = [("curves, models and runs", f"distil up --home {shlex.quote(recipe.home)}")]
    if mlflow_uri.startswith("http"):  # else a database, which has no web page
        seen = [("curves and models", without_credentials(mlflow_uri)), ("runs", os.environ.get("PREFECT_UI_URL", ""))]
    return [
        ("store", recipe.store),
        *seen,
        ("the model", f"pipeline('fill-mask', model='{model_folder}')"),
        ("status", f"distil status {command or 'RECIPE.toml'}"),
    ]
