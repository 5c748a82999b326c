"""Shards and blocks on another work pool: a run on machines with GPUs leaves the text to a deployment on CPUs.

    workspace = prepare_text_remotely(workspace)    # run.text_on = "prepare/text": starts it with the recipe and waits

Both share only the store, which is asked before and after.
"""

from typing import cast

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from storage.errors import FatalError, RetryableError
from tasks.lineage import Workspace

POLL_SECONDS = 5.0


def prepare_text_remotely(workspace: Workspace) -> Workspace:
    """Starts the deployment if shards or blocks are missing, waits for its end and returns the workspace as it is then.

    FatalError if there is no such deployment, or if its run failed: the sentence is that run's. RetryableError if it
    was cancelled or crashed.
    """
    name = workspace.recipe.run.text_on
    if not name or not workspace.lineage.lacks(workspace.store, "source", "shard", "blocks"):
        return workspace
    values = workspace.recipe.model_dump(mode="json", by_alias=True)
    try:
        parameters = {"recipe": values | {"home": _home_of(name)}, "until": "blocks"}
        run = cast(FlowRun, run_deployment(name, parameters=parameters, poll_interval=POLL_SECONDS))
    except ObjectNotFound as error:
        raise FatalError(
            f"run.text_on = {name}, but there is no such deployment; deploy it with `distil deploy`, or leave it empty"
        ) from error
    state = run.state
    if state is None or not state.is_completed():
        said = f"run {run.name} of {name} ended {state.name if state else 'nowhere'}: {state.message if state else ''}"
        raise FatalError(said) if state and state.is_failed() else RetryableError(said)
    return workspace.refreshed()


def _home_of(deployment: str) -> str:
    """The home that a deployment has of its own: ours is a folder of this machine. ObjectNotFound: there is none."""
    with get_client(sync_client=True) as client:
        own: dict[str, str] = client.read_deployment_by_name(deployment).parameters.get("recipe", {})
    return own.get("home", "")
