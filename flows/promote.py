"""Promotes a model version to champion if it passes the gate, and records the decision in MLflow and Prefect.

    distil promote RECIPE.toml [--version V] [--force --reason "..."]
    flows/promote.py:promote                    entry point of the deployments `promote/NAME` (queue `promote`)
    decide_in_flow(recipe, registry, version)   the same decision in the flow `distill`, after scoring

The gate reads only MLflow, where `record_results` has stored the relevant scores as tags of the version. MLflow's
aliases have no compare-and-set. Within one home, a file lock serializes promotions. Across machines, the champion is
read again right before the alias moves; if it changed, the gate decides again.
"""

from typing import Any

from prefect import State
from prefect.states import Completed, Failed

from flows.pipeline.task_policy import bound_flow
from flows.release.gate import PromotionRequest, decide_in_flow, gate_rows, requester, verdict_rows
from flows.tracking.model_registry import open_registry
from flows.views.tables import Table, show_table
from storage.errors import FatalError
from tasks.recipe.config import Recipe
from tasks.recipe.load import with_absolute_paths

# ---- the flow ----------------------------------------------------------------------------------------------


def run_promote(
    recipe: Recipe, model: str = "", version: str = "", force: bool = False, reason: str = "", by: str = ""
) -> State[Any]:
    """Promotes a registered model version to champion if it passes the gate. Stores the decision with the version.

    Args:
        recipe: The recipe with the gate rules, the MLflow server and the registered model.
        model: Name of the registered model, as a check. Leave it empty or enter the model that the recipe registers.
        version: Version number. Leave it empty for the challenger.
        force: Promote even if the version fails the gate. Requires a reason.
        reason: Reason for the forced promotion; stored with the version.
        by: User who requests the promotion. Leave it empty to record this flow run.
    """
    if force and not reason.strip():
        raise FatalError("a forced promotion requires a reason, which is stored with the version; set --reason")
    recipe = with_absolute_paths(recipe)
    own = recipe.register_as.name
    if model and model != own:
        raise FatalError(
            f"recipe {recipe.name} registers {own}, so its gate does not apply to {model}; use the recipe of {model}"
        )
    registry = open_registry(recipe)
    candidate = registry.version(own, version)
    request = PromotionRequest(by or requester(), force, reason.strip())
    decision = decide_in_flow(recipe, registry, candidate, request)
    show_table(Table(str(candidate), {"Gate": gate_rows(decision), "Data sets": verdict_rows(decision.rows)}))
    if decision.is_champion:
        return Completed(message=decision.sentence)
    return Failed(name="Refused", message=decision.sentence)


promote = bound_flow(run_promote, "promote", run_name="{name} {model} {version}")
