"""What `distil up` has done once its Prefect server is there: all deployments, and an end for runs left behind.

    PREFECT_API_URL=… python -m flows.services.register RECIPES.json POOL

A process of its own, which is gone afterwards: `distil up` stays for days and needs none of what this imports.
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
    """Registers the recipes in a JSON file and says which runs it marked."""
    recipes = [make_recipe(values, file) for values in json.loads(Path(file).read_text(encoding="utf-8"))]
    while not is_healthy(f"{os.environ['PREFECT_API_URL']}/health"):
        time.sleep(0.1)  # `distil up` ends us when the server does not start
    deploy(recipes, WorkPool(pool))
    with get_client(sync_client=True) as client:
        for run in mark_stale_runs(client):
            print(f"left behind by an earlier worker: {run.name}, now {run.state}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except DistilError as error:
        sys.exit(str(error))
