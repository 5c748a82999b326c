"""Runs a flow in this process, for the commands of `distil`.

    run_flow(recipe, "flows.retry", "retry_shard", stage="targets", command="mine.toml")
    run_distill_unless_done(recipe, "mine.toml")      # runs the flow `distill` unless all artifacts exist

Prefect is imported while its server starts, since both take seconds.
"""

from importlib import import_module
from typing import Any

from flows.services.servers import start_server
from storage.errors import DistilError
from tasks.recipe.config import Recipe


def run_flow(recipe: Recipe, module: str, name: str, **arguments: Any) -> None:
    """Runs the flow `name` of `module` to its end and prints its final message.

    Uses the server at PREFECT_API_URL, or starts one. DistilError with the flow's message if it does not complete.
    """
    wait = start_server(recipe.home)
    flow = getattr(import_module(module), name)  # takes seconds, during which the server starts
    wait()
    state = flow(recipe, **arguments, return_state=True)
    if state.is_completed():
        print(state.message or "done")
        return
    cause = state.result(raise_on_failure=False)
    if isinstance(cause, Exception):
        raise cause  # a programming error keeps its traceback
    raise DistilError(state.message or f"the run ended in state {state.name}")


def run_distill_unless_done(recipe: Recipe, command: str) -> None:
    """Runs the flow `distill`. If all artifacts and scores exist, shows the stored result without starting a server."""
    from flows.home import open_workspace
    from flows.pipeline.already_done import all_done, show_done

    workspace = open_workspace(recipe)
    done = all_done(workspace)
    if done:
        show_done(workspace, done, command)
        print(done.sentence)
        return
    run_flow(recipe, "flows.distill", "distill", command=command)
