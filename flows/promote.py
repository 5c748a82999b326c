"""Promotion of a model version: the gate decides, tags and a Prefect artifact record it, `champion` is the alias.

    distil promote RECIPE.toml [--version V] [--force --reason "..."]
    flows/promote.py:promote                    entry point of the deployments `promote/NAME` (queue `promote`)
    decide_in_flow(recipe, registry, version)   the same inside `distill`, after its scores

A decision reads MLflow only: `record_results` stores the scores that decide as tags of the version. MLflow's aliases
have no compare-and-set. Within one home, promotions take turns by a file lock. Across machines, the champion is read
again right before the alias moves; if it changed, the gate decides again.
"""

from typing import Any

from prefect import State
from prefect.states import Completed, Failed

from flows.pipeline.task_policy import bound_flow
from flows.release.gate import PromotionRequest, decide_in_flow, gate_rows, requester, set_rows
from flows.tracking.model_registry import open_registry
from flows.views.tables import Table, show_table
from storage.errors import FatalError
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths

# ---- the flow ----------------------------------------------------------------------------------------------


def run_promote(
    recipe: Recipe, model: str = "", version: str = "", force: bool = False, reason: str = "", by: str = ""
) -> State[Any]:
    """Makes a registered model version the champion if it passes the gate; the decision is stored with the version.

    Args:
        recipe: The recipe with the gate rules, the MLflow server and the registered model.
        model: Name of the registered model, as a check. It must be the recipe's own; empty means that one.
        version: Number of the version; empty means the challenger.
        force: Promote even if the gate refuses. Needs a reason.
        reason: Why it is forced; stored with the version.
        by: Who requests the promotion; empty means this flow run.
    """
    if force and not reason.strip():
        raise FatalError("force needs a reason, which is stored with the version; give --reason")
    recipe = with_absolute_paths(recipe)
    own = recipe.register_as.name
    if model and model != own:
        raise FatalError(
            f"recipe {recipe.name} registers {own}, so its gate says nothing about {model}; name the recipe of {model}"
        )
    registry = open_registry(recipe)
    candidate = registry.version(own, version)
    request = PromotionRequest(by or requester(), force, reason.strip())
    decision = decide_in_flow(recipe, registry, candidate, request)
    show_table(Table(str(candidate), {"Gate": gate_rows(decision), "Sets": set_rows(decision.rows)}))
    if decision.is_champion:
        return Completed(message=decision.sentence)
    return Failed(name="Refused", message=decision.sentence)


promote = bound_flow(run_promote, "promote", run_name="{name} {model} {version}")
