"""Makes shards and blocks in a different work pool, so that a run on a GPU machine does this work on CPU machines.

    workspace = prepare_text_remotely(workspace)    # run.text_on = "prepare/text": the deployment to start

The two runs share only the store.
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
    """Runs the deployment `run.text_on` if shards or blocks are missing. Returns the refreshed workspace.

    FatalError if the deployment does not exist, or with the message of its run if that failed. RetryableError if the
    run was cancelled or crashed.
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
            f"the deployment run.text_on = {name} does not exist; register it with `distil deploy`, or leave "
            "run.text_on empty"
        ) from error
    state = run.state
    if state is None or not state.is_completed():
        ended, reason = (state.name, state.message) if state else ("without a state", "")
        message = f"run {run.name} of {name} ended {ended}: {reason}"
        raise FatalError(message) if state and state.is_failed() else RetryableError(message)
    return workspace.refreshed()


def _home_of(deployment: str) -> str:
    """Returns the home in the deployment's own recipe, since our home is a folder of this machine.

    ObjectNotFound if the deployment does not exist.
    """
    with get_client(sync_client=True) as client:
        recipe: dict[str, str] = client.read_deployment_by_name(deployment).parameters.get("recipe", {})
    return recipe.get("home", "")
