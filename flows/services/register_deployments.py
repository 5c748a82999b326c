"""Registers the deployments of `distil up` and marks stale runs, as soon as its Prefect server responds.

    PREFECT_API_URL=... python -m flows.services.register_deployments RECIPES.json POOL

This is a separate process because `distil up` runs for days and does not need these imports afterwards.
"""

import json
import os
import sys
import time
from pathlib import Path

from prefect.client.orchestration import get_client

from flows.services.deploy import WorkPool, deploy
from flows.services.process import is_healthy
from flows.services.stale_runs import mark_stale_runs
from storage.errors import DistilError
from tasks.recipe.load import make_recipe


def main(file: str, pool: str) -> None:
    """Registers the deployments of the recipes in a JSON file, marks stale runs and prints them."""
    recipes = [make_recipe(values, file) for values in json.loads(Path(file).read_text(encoding="utf-8"))]
    while not is_healthy(f"{os.environ['PREFECT_API_URL']}/health"):
        time.sleep(0.1)  # `distil up` ends this process if the server does not start
    deploy(recipes, WorkPool(pool))
    with get_client(sync_client=True) as client:
        for run in mark_stale_runs(client):
            print(f"run {run.name} lost its process with an earlier worker and was marked {run.state}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except DistilError as error:
        sys.exit(str(error))
